"""A run on disk: entering its directory, its checkpoints, and what it publishes."""
