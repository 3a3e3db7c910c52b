"""Causal language models with reward tokens."""
