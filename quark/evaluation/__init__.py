"""Measuring models on held-out prompts."""
