"""A smaller vocabulary: tokenizer and embeddings."""
