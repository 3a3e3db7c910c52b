"""The Python interface: what `import quark` offers, shared with the commands."""
