"""Mask search without retraining: costs, search, rearrangement, rescaling."""
