"""Quantization-aware training: fake quantization while a Trainer trains, folded into the weights at the end."""
