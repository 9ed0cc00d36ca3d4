"""Heads, neurons and channels: what writes and reads them, and cutting them out."""
