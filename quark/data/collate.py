"""Minibatches of the pool as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from quark.errors import PoolCorruptedError
from quark.models.batch import TrainingBatch, valid_positions

__all__ = ["PaddedSamples", "TrainingBatch", "collate"]


class PaddedSamples(Protocol):
    """The part of a pool's minibatch that training reads."""

    @property
    def quantiles(self) -> NDArray[np.int16]:
        """[B] quantile of each sample, 0 for the lowest rewards."""
        ...

    @property
    def prompt_tokens(self) -> NDArray[np.int64 | np.int32]:
        """[B, P] token ids of the prompts, padded on the left."""
        ...

    @property
    def prompt_lengths(self) -> NDArray[np.int32]:
        """[B] number of tokens in each prompt, without padding."""
        ...

    @property
    def completion_tokens(self) -> NDArray[np.int64 | np.int32]:
        """[B, C] token ids of the completions, padded on the right."""
        ...

    @property
    def completion_lengths(self) -> NDArray[np.int32]:
        """[B] number of tokens in each completion, without padding."""
        ...


def collate(
    batch: PaddedSamples,
    reward_token_ids: Sequence[int],
    pad_id: int,
    device: torch.device,
    *,
    sample_ids: NDArray[np.uint64] | None = None,
) -> TrainingBatch:
    """Tensors on ``device`` for a minibatch of the pool; every sample has the token of its quantile.

    Args:
        batch: a minibatch with quantiles in 0 .. K-1, prompts left-padded, completions right-padded.
        reward_token_ids: [K] ids, quantile 0 (lowest) first.
        pad_id: fills the padding; never read.
        device: where the tensors go.
        sample_ids: [B] ids if the samples come from the run's pool.

    Raises:
        ValueError: a sample without a quantile, or without a single prompt or completion token.
        PoolCorruptedError: a token that is none of the model's own, which no append takes.
    """
    if batch.quantiles.min() < 0 or batch.quantiles.max() >= len(reward_token_ids):
        raise ValueError(
            f"a training batch needs quantiles in 0 .. {len(reward_token_ids) - 1}, "
            f"found {batch.quantiles.min()} .. {batch.quantiles.max()}"
        )
    if batch.prompt_lengths.min() < 1 or batch.completion_lengths.min() < 1:
        raise ValueError("every sample of a training batch needs a prompt and a completion token")

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64))

    prompt_lengths, completion_lengths = batch.prompt_lengths, batch.completion_lengths
    width, steps = int(prompt_lengths.max()), int(completion_lengths.max())
    prompts = tensor(batch.prompt_tokens[:, batch.prompt_tokens.shape[1] - width :])
    completions = tensor(batch.completion_tokens[:, :steps])
    lengths = tensor(completion_lengths)
    completions[torch.arange(steps) >= lengths.unsqueeze(1)] = pad_id
    ids = np.asarray(reward_token_ids, dtype=np.int64)
    largest = max(int(prompts.max()), int(completions.max()))
    if largest >= ids.min():
        raise PoolCorruptedError(
            f"a sample has the token {largest}, and the model's own tokens end at {ids.min() - 1}: `quark pool verify` "
            "says which file is damaged"
        )
    return TrainingBatch(
        reward_tokens=torch.from_numpy(ids[batch.quantiles]).to(device),
        prompt_tokens=prompts.to(device),
        prompt_lengths=tensor(prompt_lengths).to(device),
        completion_tokens=completions.to(device),
        completion_lengths=lengths.to(device),
        sample_ids=None if sample_ids is None else tensor(sample_ids).to(device),
        token_index=valid_positions(lengths, steps).to(device),
    )
