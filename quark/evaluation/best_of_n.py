"""Best-of-n sampling, measured without doing it: the unbiased estimate from N >= n scored samples, and its exact KL."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n || the sampled model) of a completion in nats: log n - (n - 1) / n.

    Exact where no two completions score equally, otherwise an upper bound.

    >>> round(best_of_n_kl(2), 3), round(best_of_n_kl(64), 3)
    (0.193, 3.175)
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(size: int, n: int) -> NDArray[np.float64]:
    """[N] chance that the i-th lowest of ``size`` samples is the best of ``n`` drawn without replacement.

    >>> best_of_n_weights(4, 2).round(4).tolist()
    [0.0, 0.1667, 0.3333, 0.5]

    Raises:
        ValueError: ``n`` is not in 1 .. ``size``.
    """
    if not 1 <= n <= size:
        raise ValueError(f"best of {n} needs at least {n} samples of a prompt, not {size}")
    weights = np.zeros(size)
    weights[-1] = n / size
    for i in range(size - 1, n - 1, -1):
        weights[i - 1] = weights[i] * (i + 1 - n) / i
    return weights


def best_of_n(
    scores: NDArray[np.floating[Any]], gold: NDArray[np.floating[Any]], n: int
) -> NDArray[np.float64]:
    """[P] the expected ``gold`` of the sample that scores best among ``n``, by prompt.

    Args:
        scores: [P, N] what the best is chosen by; no NaN.
        gold: [P, N] what is measured: the same scores, or those of a judge. Samples of equal score share their mean.
        n: at most N. Near N the estimate rests on few samples.

    >>> best_of_n(np.array([[1.0, 3.0, 2.0, 4.0]]), np.array([[1.0, 3.0, 2.0, 4.0]]), 2).round(4).tolist()
    [3.3333]
    """
    weights = best_of_n_weights(scores.shape[1], n)
    found = np.empty(len(scores))
    for row, (choice, value) in enumerate(zip(scores, gold, strict=True)):
        order = np.argsort(choice, kind="stable")
        _, group = np.unique(choice, return_inverse=True)
        shared = np.bincount(group, value) / np.bincount(group)
        found[row] = float(weights @ shared[group][order])
    return found
