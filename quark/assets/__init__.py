"""Files that ship inside the wheel: the embedded model, rewards and prompts."""
