"""The token critic of a round: fitted to the samples that it trains on, with the original model's output vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from quark.errors import ModelError
from quark.models.token_critic import TokenCritic
from quark.objectives.advantages import standardized_ranks
from quark.objectives.tilt import ridge
from quark.pool.base import Quantization, SamplePool
from quark.pool.columns import REWARD_COLUMN
from quark.pool.scope import Score, scores_by

MOST_SAMPLES = 1 << 15
"""Samples that a critic is fitted on, the newest: more would hardly change it, and they are held in memory."""
WEAK = 0.1
"""A critic that explains less of the rewards' ranks at the end of a run hardly moves them."""
_BLOCK = 1 << 16
"""Vectors that are worked on at a time."""


def fit_critic(
    pool: SamplePool,
    quantization: Quantization,
    model: PreTrainedModel,
    *,
    base_vocab_size: int,
    within_prompts: bool,
    score: Score = REWARD_COLUMN,
) -> TokenCritic:
    """The critic that the samples of a ranking give.

    Args:
        pool: with the samples.
        quantization: samples without a quantile in it are left out.
        model: the original one; its output vectors, or its input vectors where it has no output vectors, say which
            tokens are alike.
        base_vocab_size: number W of tokens that are scored.
        within_prompts: rank samples among those of their prompt alone.
        score: what to rank by.

    Raises:
        ModelError: the model has no vector for each token.
    """
    ids = np.arange(pool.num_removed, len(pool), dtype=np.uint64)
    ids = ids[quantization.labels_of(ids) >= 0][-MOST_SAMPLES:]
    places = ids.astype(np.int64)
    groups = pool.column("prompt_id")[places].astype(np.int64) if within_prompts else None
    targets = standardized_ranks(
        scores_by(pool, score)[places],
        np.zeros(len(ids), dtype=np.int64) if groups is None else groups,
    ).astype(np.float64)
    vectors = token_vectors(model, base_vocab_size)
    packed = pool.gather_packed(ids)
    tokens = packed.completion_tokens.astype(np.int64)
    center = _mean_vector(vectors, tokens)
    features = _sums(vectors, center, tokens, packed.completion_offsets)
    if groups is not None:
        features = _within(features, groups)
    found = ridge(features, targets)
    return TokenCritic(
        scores=_scores(vectors, center, found.weights),
        explained=found.explained,
        num_samples=found.num_samples,
    )


def weakness_of(critic: TokenCritic, *, is_last_round: bool) -> str | None:
    """Why guidance by a critic has little effect, and what may help; None if it has some, or may still get it."""
    if critic.explained == 0.0:
        return (
            f"the tokens of {critic.num_samples:,} samples do not explain their rewards, so the critic does not guide. "
            "More samples may change that"
        )
    if is_last_round and critic.explained < WEAK:
        return (
            f"the critic explains {critic.explained:.0%} of how {critic.num_samples:,} samples rank, so guidance changes "
            "the reward little: more samples or a larger sampling.guidance may help. "
            "A reward that single tokens do not predict needs trained weights, as in the preset own"
        )
    return None


def token_vectors(model: PreTrainedModel, base_vocab_size: int) -> Tensor:
    """[W, D] the output vectors of the base vocabulary: a view without gradient."""
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        weight: Any = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) >= base_vocab_size:
            return weight.detach()[:base_vocab_size]
    raise ModelError(
        f"a token critic needs one output vector for each token, and {type(model).__name__} has none that can be read: "
        'set objective.tilt_coef to 0 and sampling.guide to "tokens"'
    )


def _mean_vector(vectors: Tensor, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """[D] mean over tokens, each as often as it occurs."""
    counts = np.bincount(tokens, minlength=len(vectors))
    total = np.zeros(vectors.shape[1])
    for begin in range(0, len(vectors), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        total += counts[part] @ _rows(vectors[part])
    mean: NDArray[np.float64] = total / max(len(tokens), 1)
    return mean


def _sums(
    vectors: Tensor,
    center: NDArray[np.float64],
    tokens: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> NDArray[np.float64]:
    """[N, D] sums of the centered vectors of the tokens ``offsets[i] .. offsets[i + 1]``."""
    sums = np.zeros((len(offsets) - 1, vectors.shape[1]))
    lengths = np.diff(offsets)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    for begin in range(0, len(tokens), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        taken = _rows(vectors[torch.from_numpy(tokens[part]).to(vectors.device)]) - center
        begins = np.flatnonzero(np.r_[True, np.diff(rows[part]) > 0])
        sums[rows[part][begins]] += np.add.reduceat(taken, begins, axis=0)
    return sums


def _within(features: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """``features`` [N, D] about the mean of their group."""
    _, member, counts = np.unique(groups, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), features.shape[1]))
    np.add.at(sums, member, features)
    centered: NDArray[np.float64] = features - (sums / counts[:, None])[member]
    return centered


def _scores(
    vectors: Tensor, center: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float32]:
    """[W] of every token."""
    scores = np.empty(len(vectors), dtype=np.float32)
    for begin in range(0, len(vectors), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        scores[part] = (_rows(vectors[part]) - center) @ weights
    return scores


def _rows(vectors: Tensor) -> NDArray[np.float64]:
    rows: NDArray[np.float64] = vectors.cpu().double().numpy()
    return rows
