"""Samples of other tools into a pool, and training sets for other tools out of it."""
