"""The command line: one file per command, a console, and the exit codes.

Importing anything here loads neither torch nor transformers; each command loads its dependencies when it runs.
"""
