"""Quark beside other trainers: their rollouts go into a pool as they are scored."""
