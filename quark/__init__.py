"""Quark: teach or unteach a language model with any black-box reward.

Quantized Reward Konditioning (Lu et al., NeurIPS 2022) on a durable sample pool.
"""

__version__ = "0.1.0"
