"""The command line: one file per command, a console, and the exit codes.

Importing anything here loads neither torch nor transformers; a command loads what it needs when it runs.
"""
