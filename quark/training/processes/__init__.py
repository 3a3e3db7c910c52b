"""The processes of one run: which they are, what they exchange, and where the weights lie."""
