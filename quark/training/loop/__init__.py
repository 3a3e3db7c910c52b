"""The loop: explore, quantize, learn, evaluate."""
