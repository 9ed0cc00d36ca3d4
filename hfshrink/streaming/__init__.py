"""Checkpoints of any size, file to file: one tensor in memory at a time, resumed after a kill."""
