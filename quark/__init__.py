"""Quark: teach or unteach a language model with any black-box reward.

Quantized Reward Konditioning (Lu et al., NeurIPS 2022) on a durable sample pool.

>>> import quark
>>> run = quark.train("demo")  # doctest: +SKIP
>>> run.generate("Pros:")  # doctest: +SKIP

Names are loaded when they are first used: torch and transformers are imported when a model is needed.
"""

import importlib

__version__ = "0.1.0"

_PLACES = {
    "Lowest": "quark.pool.scope",
    "MeanMinusVariance": "quark.pool.scope",
    "Pool": "quark.api.pool",
    "QuarkError": "quark.errors",
    "RankMean": "quark.pool.scope",
    "Run": "quark.api.run",
    "Sample": "quark.pool.base",
    "SampleBatch": "quark.pool.base",
    "SamplingMode": "quark.pool.base",
    "Scope": "quark.pool.scope",
    "TieRule": "quark.pool.base",
    "TrainedModel": "quark.api.trained_model",
    "WeightedSum": "quark.pool.scope",
    "load": "quark.api.run",
    "reward": "quark.api.rewards",
    "train": "quark.api.train",
}
"""The module of each name; ``__init__.pyi`` says the same to type checkers."""

__all__ = sorted([*_PLACES, "__version__"])


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'quark' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
