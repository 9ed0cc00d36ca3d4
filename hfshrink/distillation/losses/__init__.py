"""What the student is asked to match: formulas, loss objects, and what they need to see inside the models."""
