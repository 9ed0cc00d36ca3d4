"""What a weight or unit is worth, and which go."""
