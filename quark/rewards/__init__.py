"""Rewards: texts in, scores out; built-in scorers, classifiers, heuristics, callables and HTTP."""
