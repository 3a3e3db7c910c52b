"""The sample pool: its contract, the Rust pool, and its specification in plain Python."""
