"""The process group of a run, its communication, and the layout of the weights."""
