"""Minibatches in memory: padded, packed, or in buffers of the caller."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

TokenArray: TypeAlias = NDArray[np.int64 | np.int32]
"""Token ids: int64, unless the buffers of the caller are int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolBatch:
    """A padded minibatch, ready for torch. The arrays belong to the caller."""

    ids: NDArray[np.uint64]
    """[B] sample ids."""
    quantiles: NDArray[np.int16]
    """[B] labels, 0 lowest; -1 when gathered by id without a quantization."""
    prompt_tokens: TokenArray
    """[B, P] left-padded with ``pad_id``."""
    prompt_lengths: NDArray[np.int32]
    """[B]"""
    completion_tokens: TokenArray
    """[B, T] right-padded with ``pad_id``."""
    completion_lengths: NDArray[np.int32]
    """[B], including the end-of-sequence token."""
    scores: NDArray[np.float32]
    """[B] the score column that the ranking used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A minibatch without padding: sample i has the tokens ``offsets[i] .. offsets[i + 1]``."""

    ids: NDArray[np.uint64]
    """[B] sample ids."""
    quantiles: NDArray[np.int16]
    """[B] labels, 0 lowest; -1 when gathered by id without a quantization."""
    prompt_tokens: TokenArray
    """[sum of lengths] all prompts one after another."""
    prompt_offsets: NDArray[np.int64]
    """[B + 1]"""
    completion_tokens: TokenArray
    """[sum of lengths] all completions one after another."""
    completion_offsets: NDArray[np.int64]
    """[B + 1]"""
    scores: NDArray[np.float32]
    """[B] the score column that the ranking used."""


_Batch = TypeVar("_Batch", bound=PoolBatch | PackedBatch)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBuffers:
    """Buffers of the caller that batches are written into, without allocations. The next batch overwrites them.

    The returned batch consists of views of the buffers. All buffers are contiguous vectors and may be larger than a
    batch needs. A buffer that is too small raises a ValueError with the needed size. For pinned memory, create them
    with ``torch.empty(..., pin_memory=True).numpy()``.
    """

    ids: NDArray[np.uint64]
    """[B]"""
    quantiles: NDArray[np.int16]
    """[B]"""
    scores: NDArray[np.float32]
    """[B]"""
    prompt_tokens: TokenArray
    """[B times the longest prompt] of padded batches; [sum of lengths] of packed batches."""
    prompt_lengths: NDArray[np.int32]
    """[B], of padded batches."""
    prompt_offsets: NDArray[np.int64]
    """[B + 1], of packed batches."""
    completion_tokens: TokenArray
    """Like ``prompt_tokens``."""
    completion_lengths: NDArray[np.int32]
    """[B], of padded batches."""
    completion_offsets: NDArray[np.int64]
    """[B + 1], of packed batches."""
    _latest: dict[tuple[int, int, int], PoolBatch] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Views of the latest shape. Batches of one size mostly have the same shape, and creating views takes as long as
    finding twenty samples."""

    @classmethod
    def allocate(
        cls,
        batch_size: int,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        dtype: type[np.int64 | np.int32] = np.int64,
    ) -> BatchBuffers:
        """Buffers for ``batch_size`` rows and for this many token ids in total, padding included."""
        return cls(
            ids=np.zeros(batch_size, np.uint64),
            quantiles=np.zeros(batch_size, np.int16),
            scores=np.zeros(batch_size, np.float32),
            prompt_tokens=np.zeros(prompt_tokens, dtype),
            prompt_lengths=np.zeros(batch_size, np.int32),
            prompt_offsets=np.zeros(batch_size + 1, np.int64),
            completion_tokens=np.zeros(completion_tokens, dtype),
            completion_lengths=np.zeros(batch_size, np.int32),
            completion_offsets=np.zeros(batch_size + 1, np.int64),
        )

    def __getstate__(self) -> list[object]:
        """The state to copy and pickle, without the views: they would not refer to the arrays of the copy."""
        return [{} if f.name == "_latest" else getattr(self, f.name) for f in fields(self)]

    def copied(self, batch: _Batch) -> _Batch:
        """Copy ``batch`` into these buffers.

        Raises:
            ValueError: it does not fit.
        """
        views = {}
        for name in type(batch).__slots__:
            values, buffer = getattr(batch, name), getattr(self, name)
            if len(buffer) < values.size:
                raise ValueError(
                    f"the buffer for {name} has room for {len(buffer)} numbers; this batch needs {values.size}"
                )
            view = buffer[: values.size].reshape(values.shape)
            if view.itemsize < values.itemsize and values.size:
                limits = np.iinfo(view.dtype)
                if values.min() < limits.min or values.max() > limits.max:
                    raise ValueError(
                        f"the buffer for {name} is {view.dtype}, and a token id or pad_id does not fit that type"
                    )
            np.copyto(view, values, casting="same_kind")
            views[name] = view
        return type(batch)(**views)

    def padded(self, rows: int, prompt_width: int, completion_width: int) -> PoolBatch:
        """A padded batch of ``rows`` samples that was written here, as views."""
        shape = (rows, prompt_width, completion_width)
        batch = self._latest.get(shape)
        if batch is None:
            batch = self._views(*shape)
            self._latest.clear()
            self._latest[shape] = batch
        return batch

    def _views(self, rows: int, prompt_width: int, completion_width: int) -> PoolBatch:
        return PoolBatch(
            ids=self.ids[:rows],
            quantiles=self.quantiles[:rows],
            prompt_tokens=self.prompt_tokens[: rows * prompt_width].reshape(rows, prompt_width),
            prompt_lengths=self.prompt_lengths[:rows],
            completion_tokens=self.completion_tokens[: rows * completion_width].reshape(
                rows, completion_width
            ),
            completion_lengths=self.completion_lengths[:rows],
            scores=self.scores[:rows],
        )

    def packed(self, rows: int, num_prompt_tokens: int, num_completion_tokens: int) -> PackedBatch:
        """A packed batch of ``rows`` samples that was written here, as views."""
        return PackedBatch(
            ids=self.ids[:rows],
            quantiles=self.quantiles[:rows],
            prompt_tokens=self.prompt_tokens[:num_prompt_tokens],
            prompt_offsets=self.prompt_offsets[: rows + 1],
            completion_tokens=self.completion_tokens[:num_completion_tokens],
            completion_offsets=self.completion_offsets[: rows + 1],
            scores=self.scores[:rows],
        )
