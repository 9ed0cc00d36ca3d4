"""Teachers: aligned with the student, asked alone or together, and their answers kept on disk."""
