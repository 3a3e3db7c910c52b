"""The distribution that completions are drawn from: guided, tempered and truncated logits.

The sampler draws from it and the evaluator measures its distance to the original model, so both use
the same distribution. Shapes: B rows, W columns of the base vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from quark.generation.base import SamplingConfig
from quark.models.token_critic import TokenCritic

_COLDEST = 1e-30
"""Dividing logits by a lower temperature would overflow float32. At this one, the most likely token
already has all the probability."""


def allowed_logits(
    logits: Tensor,
    config: SamplingConfig,
    *,
    away: Tensor | None = None,
    tilt: Tensor | None = None,
    forbidden: Tensor | None = None,
) -> Tensor:
    """Logits [B, W] after guidance, -inf where a token is left out; before temperature and truncation.

    Args:
        logits: float32 [B, W].
        config: ``guidance`` and ``guidance_floor`` are read.
        away: float32 [B, W] logits to guide away from.
        tilt: float32 [W] what a critic adds.
        forbidden: bool [B, W] or [1, W] tokens that may not be sampled.
    """
    allowed = logits
    if forbidden is not None:
        allowed = logits.masked_fill(forbidden, -torch.inf)
    if away is not None:
        likeliest = allowed.max(-1, keepdim=True).values
        implausible = allowed < likeliest + math.log(config.guidance_floor)
        guided = allowed + config.guidance * (allowed - away)
        allowed = guided.masked_fill(implausible, -torch.inf)
    if tilt is not None:
        allowed = allowed + tilt
    return allowed


def guiding_tilt(
    config: SamplingConfig,
    critic: TokenCritic | None,
    *,
    quantile: int | None,
    num_quantiles: int,
    device: torch.device,
) -> Tensor | None:
    """What the critic adds to the logits, float32 [W]; None where it does not guide."""
    if config.guide != "critic" or config.guidance == 0.0 or critic is None or quantile is None:
        return None
    tilt = critic.tilt(config.guidance, quantile=quantile, num_quantiles=num_quantiles)
    return torch.from_numpy(tilt).to(device)


def is_guided_away(config: SamplingConfig, quantile: int | None) -> bool:
    """Whether a quantile is guided away from the worst token, which would be no guidance for that token itself."""
    is_on = config.guide == "tokens" and config.guidance > 0.0
    return is_on and quantile is not None and quantile > 0


def probabilities_of(allowed: Tensor, config: SamplingConfig) -> Tensor:
    """The sampled distribution [B, W], not normalized if ``top_k`` or ``top_p`` leaves tokens out.

    ``top_k`` and then ``top_p`` remove the unlikely tokens; tokens as likely as the last one that
    is kept are kept too. Temperature 0 gives all probability to the most likely token.
    """
    if config.temperature == 0.0:
        best = allowed.argmax(-1, keepdim=True)
        return torch.zeros_like(allowed).scatter_(1, best, 1.0)
    probabilities = torch.softmax(allowed / max(config.temperature, _COLDEST), -1)
    truncates = 0 < config.top_k < probabilities.shape[1]
    if truncates or config.top_p < 1.0:
        descending = _sorted_descending(probabilities)
        if truncates:
            descending = descending[:, : config.top_k]
        last = torch.full_like(descending[:, :1], descending.shape[1] - 1, dtype=torch.int64)
        if config.top_p < 1.0:
            # The nucleus ends with the first token that brings the cumulative mass to top_p.
            mass = descending.cumsum(-1, dtype=torch.float64)
            last = torch.minimum(last, torch.searchsorted(mass, mass[:, -1:] * config.top_p))
        least = descending.gather(1, last)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities


def draw(probabilities: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution of each row [B, W] at ``numbers`` [B] in [0, 1).

    Returns:
        Ids [B], and their log-probabilities, float64 [B] in nats, under the normalized ``probabilities``.
    """
    # float64: in float32 the tail of a large vocabulary would be lost in rounding.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    place = torch.searchsorted(cumulative, numbers.unsqueeze(1) * total, right=True)
    place.clamp_(max=cumulative.shape[1] - 1)
    logprobs = probabilities.gather(1, place).double().log() - total.log()
    return place.squeeze(1), logprobs.squeeze(1)


def divergence(probabilities: Tensor, log_reference: Tensor) -> Tensor:
    """KL(q || p0) [B] in nats, for q proportional to ``probabilities`` [B, W]; tokens without probability add 0."""
    normalized = probabilities / probabilities.sum(-1, keepdim=True)
    return (torch.xlogy(normalized, normalized) - normalized * log_reference).sum(-1)


def _sorted_descending(values: Tensor) -> Tensor:
    """Each row of ``values`` sorted, largest first."""
    if values.device.type == "cpu":
        # NumPy's sort is about twenty times faster than torch's, which also sorts indices.
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    return values.sort(dim=-1, descending=True).values
