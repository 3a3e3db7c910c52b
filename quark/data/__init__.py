"""Prompts in, training tensors out."""
