"""Weights of PyTorch models in fewer bits: bf16, fp16, and bitsandbytes' int8, nf4 and fp4."""
