"""The Trainer with a teacher, and the one call around it."""
