"""Measurements of models on held-out prompts."""
