"""Configuration: the schema, where values come from, and presets."""
