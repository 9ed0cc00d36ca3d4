"""Pruning while a model trains."""
