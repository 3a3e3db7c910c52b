"""What a model has to do for a run, tried before the run begins."""
