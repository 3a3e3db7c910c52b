"""A local page over runs and pools: what it asks for, the server that answers, and the page itself."""
