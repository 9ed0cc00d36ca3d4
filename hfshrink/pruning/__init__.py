"""Pruning: gradual in the Trainer, one-shot, and cut for real."""
