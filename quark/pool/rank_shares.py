"""The place of each score among the others, blind to their scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rank_share(column: NDArray[np.float32]) -> NDArray[np.float64]:
    """[N] of the scored samples, the share that is lower, ties half; NaN without a score."""
    shares = np.full(len(column), np.nan)
    is_scored = ~np.isnan(column)
    scored = column[is_scored]
    if scored.size:
        _, block, sizes = np.unique(scored, return_inverse=True, return_counts=True)
        middles = np.cumsum(sizes) - sizes / 2
        shares[is_scored] = middles[block] / scored.size
    return shares
