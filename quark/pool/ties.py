"""How much of a ranking is decided by the tie rule alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def tie_share(
    scores: NDArray[np.float32],
    labels: NDArray[np.int16],
    prompt_ids: NDArray[np.uint32] | None = None,
) -> float:
    """Share of the ranked samples whose quantile the tie rule chose, from 0 to 1; 0 where none is ranked.

    These are the samples whose score occurs in more than one quantile. The rule ``hash`` draws lots among them,
    so their reward tokens say nothing about their rewards.

    Args:
        scores: [N] that were ranked.
        labels: [N] the quantile of each sample, -1 for unranked ones.
        prompt_ids: [N] where each prompt was ranked for itself: a score is then compared within its prompt.
    """
    is_ranked = labels >= 0
    num_ranked = int(is_ranked.sum())
    if not num_ranked:
        return 0.0
    keys: list[NDArray[Any]] = [scores[is_ranked]]
    if prompt_ids is not None:
        keys.append(prompt_ids[is_ranked])
    own = labels[is_ranked]
    order = np.lexsort([own, *keys])
    is_first = np.zeros(num_ranked, dtype=np.bool_)
    is_first[0] = True
    for key in keys:
        ordered = key[order]
        is_first[1:] |= ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_first)
    sizes = np.diff(starts, append=num_ranked)
    lowest, highest = own[order][starts], own[order][starts + sizes - 1]
    return float(sizes[lowest < highest].sum() / num_ranked)


def repeated_share(scores: NDArray[np.float32]) -> float:
    """Share of the scored samples [N] that have another sample's score, from 0 to 1; 0 where none is scored."""
    scored = scores[~np.isnan(scores)]
    if not scored.size:
        return 0.0
    _, sizes = np.unique(scored, return_counts=True)
    return float(sizes[sizes > 1].sum() / scored.size)
