"""Pruning in one call."""
