"""Configuration: the schema, the sources of values, and presets."""
