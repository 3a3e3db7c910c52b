"""Proofs, on the user's own machine and disk, of what the sample pool promises."""
