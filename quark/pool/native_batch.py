"""A batch to append in the form that the extension reads: contiguous arrays of exact types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from quark.pool.base import PromptColumns, PromptRecord, SampleBatch
from quark.pool.checks import as_vector, bounded
from quark.pool.sample_columns import BATCH_COLUMNS


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchArrays:
    """A ``SampleBatch`` whose attributes the extension reads."""

    key: str
    prompt_tokens: NDArray[np.uint32]
    prompt_offsets: NDArray[np.int64]
    prompt_texts: list[str] | None
    prompt_metadata: list[str] | None
    prompt_index: NDArray[np.uint32]
    completion_tokens: NDArray[np.uint32]
    completion_offsets: NDArray[np.int64]
    completion_texts: list[str] | None
    round: int
    chunk: int
    policy_step: int
    settings: str
    numbers: dict[str, NDArray[Any]]
    scores: list[tuple[str, NDArray[np.float32]]]

    @classmethod
    def of(cls, batch: SampleBatch) -> Self:
        """Convert ``batch``. Raises ValueError for an array of the wrong type or a number out of range."""
        prompts = _as_columns(batch.prompts)
        texts = batch.completion_texts
        return cls(
            key=batch.key,
            prompt_tokens=as_vector("token_ids", prompts.token_ids, np.uint32),
            prompt_offsets=as_vector("offsets", prompts.offsets, np.int64),
            prompt_texts=None if prompts.texts is None else list(prompts.texts),
            prompt_metadata=None if prompts.metadata is None else list(prompts.metadata),
            prompt_index=as_vector("prompt_index", batch.prompt_index, np.uint32),
            completion_tokens=as_vector("completion_tokens", batch.completion_tokens, np.uint32),
            completion_offsets=as_vector("completion_offsets", batch.completion_offsets, np.int64),
            completion_texts=None if texts is None else list(texts),
            round=bounded("round", batch.round, 32),
            chunk=bounded("chunk", batch.chunk, 32),
            policy_step=bounded("policy_step", batch.policy_step, 32),
            settings=batch.settings,
            numbers={
                column.given: as_vector(
                    column.given, column.values(batch, len(batch.prompt_index)), column.dtype.type
                )
                for column in BATCH_COLUMNS
            },
            scores=[
                (name, as_vector(f"scores[{name!r}]", values, np.float32))
                for name, values in batch.scores.items()
            ],
        )


def _as_columns(prompts: Sequence[PromptRecord]) -> PromptColumns:
    """Concatenate the prompts."""
    if isinstance(prompts, PromptColumns):
        return prompts
    nothing = np.empty(0, np.uint32)
    vectors = [prompt.token_ids for prompt in prompts]
    try:
        # A batch has thousands of prompts, nearly always vectors of the right type. One check for all is fast.
        tokens = np.concatenate([nothing, *vectors], casting="no", dtype=np.uint32)
    except (TypeError, ValueError):
        vectors = [as_vector("token_ids", vector, np.uint32) for vector in vectors]
        tokens = np.concatenate([nothing, *vectors])
    offsets = np.zeros(len(prompts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, vectors), np.int64, len(vectors)), out=offsets[1:])
    return PromptColumns(
        token_ids=tokens,
        offsets=offsets,
        texts=[prompt.text for prompt in prompts],
        metadata=[prompt.metadata for prompt in prompts],
    )
