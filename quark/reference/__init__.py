"""The original model as the anchor of the KL penalty."""
