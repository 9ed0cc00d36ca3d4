"""Texts to learn from: augmented, made up, written by the student, read in other tokens."""
