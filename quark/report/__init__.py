"""A run directory as one HTML page: read only, self-contained, without JavaScript.

Knows nothing of training: whatever wrote the files of a run directory can be shown.
"""
