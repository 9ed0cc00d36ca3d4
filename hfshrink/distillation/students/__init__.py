"""Students cut from their teacher, or of another family."""
