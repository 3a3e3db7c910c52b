"""Rankings of the Rust pool and the minibatches drawn from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from quark import _pool_rs
from quark.pool.base import SamplingMode, Snapshot, age_weights
from quark.pool.batch import BatchBuffers, PackedBatch, PoolBatch
from quark.pool.checks import as_rule, as_vector, bounded
from quark.pool.origin import Origin, reads

_Batch = TypeVar("_Batch", bound=PoolBatch | PackedBatch)
_Place = TypeVar("_Place")


class NativeSampler:
    """A stateless stream of minibatches; see ``quark.pool.base.Sampler``."""

    def __init__(self, sampler: _pool_rs.Sampler, origin: Origin) -> None:
        self._sampler = sampler
        self._origin = origin

    @property
    def num_batches(self) -> int | None:
        """Number of batches until the samples are used up; None without ``max_uses``."""
        return self._sampler.num_batches

    @reads
    def draw(self, step: int) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
        """Ids and quantiles of this rank's rows of batch ``step``. Raises ValueError beyond the last batch."""
        drawn = self._sampler.draw(bounded("step", step, 64))
        return drawn.ids, drawn.quantiles

    @reads
    def batch(self, step: int, *, pad_id: int, out: BatchBuffers | None = None) -> PoolBatch:
        """Draw batch ``step`` and read its rows, padded, with their quantiles and scores."""
        step = bounded("step", step, 64)
        if out is not None:
            return padded_into(out, self._sampler.batch_into, step, pad_id)
        return drawn_batch(self._sampler.batch(step, pad_id))

    @reads
    def packed(self, step: int, *, out: BatchBuffers | None = None) -> PackedBatch:
        """Draw batch ``step`` and read its rows as flat arrays, with their quantiles and scores."""
        step = bounded("step", step, 64)
        if out is not None:
            return packed_into(out, self._sampler.batch_into, step)
        return drawn_packed_batch(self._sampler.packed(step))

    def stream(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        pad_id: int,
        depth: int = 2,
        out: Sequence[BatchBuffers] = (),
    ) -> NativeStream[PoolBatch]:
        """The padded batches from ``start`` on; a thread of the extension reads up to ``depth`` of them ahead."""
        return NativeStream(self._start(start, stop, pad_id, depth), drawn_batch, out, self._origin)

    def packed_stream(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        depth: int = 2,
        out: Sequence[BatchBuffers] = (),
    ) -> NativeStream[PackedBatch]:
        """The packed batches from ``start`` on; a thread of the extension reads up to ``depth`` of them ahead."""
        return NativeStream(
            self._start(start, stop, None, depth), drawn_packed_batch, out, self._origin
        )

    def _start(
        self, start: int, stop: int | None, pad_id: int | None, depth: int
    ) -> _pool_rs.Stream:
        end = self.num_batches if stop is None else stop
        return self._sampler.stream(
            bounded("start", start, 64),
            (1 << 64) - 1 if end is None else bounded("stop", end, 64),
            pad_id,
            bounded("depth", depth, 16),
        )


class NativeStream(Generic[_Batch]):
    """Batches that a thread of the extension prepares; see ``quark.pool.base.BatchStream``."""

    def __init__(
        self,
        stream: _pool_rs.Stream,
        dress: Callable[[Any], _Batch],
        out: Sequence[BatchBuffers],
        origin: Origin,
    ) -> None:
        self._stream = stream
        self._origin = origin
        self._dress = dress
        self._ring = itertools.cycle(out) if out else None

    def __iter__(self) -> Self:
        return self

    @reads
    def __next__(self) -> _Batch:
        prepared = self._stream.next()
        if prepared is None:
            raise StopIteration
        batch = self._dress(prepared)
        return batch if self._ring is None else next(self._ring).copied(batch)

    def close(self) -> None:
        """Stop the extension's thread and wait for it to end; no further batch follows."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NativeQuantization:
    """The ranking of one snapshot, cut into quantiles; see ``quark.pool.base.Quantization``."""

    def __init__(
        self, quantization: _pool_rs.Quantization, num_quantiles: int, origin: Origin
    ) -> None:
        self._quantization = quantization
        self._origin = origin
        self._num_quantiles = num_quantiles

    @property
    def num_quantiles(self) -> int:
        """Number K of quantiles, empty ones included."""
        return self._num_quantiles

    @property
    def snapshot(self) -> Snapshot:
        """The commit whose samples are ranked."""
        return snapshot_of(self._quantization.snapshot)

    @property
    @reads
    def counts(self) -> NDArray[np.int64]:
        """[K] number of samples in each quantile."""
        return self._quantization.counts

    @property
    @reads
    def lower_bounds(self) -> NDArray[np.float32]:
        """[K] lowest value in each quantile, NaN for an empty one."""
        return self._quantization.lower_bounds

    @property
    @reads
    def num_unranked(self) -> int:
        """Number of samples that are in no quantile; removed samples do not count."""
        return self._quantization.num_unranked

    @reads
    def labels(self) -> NDArray[np.int16]:
        """[N] quantile of each sample in id order, -1 for a sample that is in none."""
        return self._quantization.labels()

    @reads
    def labels_of(self, ids: NDArray[np.uint64]) -> NDArray[np.int16]:
        """[M] quantiles of the samples with these ids. Raises IndexError for an unknown or removed id."""
        return self._quantization.labels_of(as_vector("ids", ids, np.uint64))

    @reads
    def only(self, is_kept: NDArray[np.bool_]) -> NativeQuantization:
        """The same cuts without the samples where ``is_kept`` [N] is false. Raises ValueError for another length."""
        kept = self._quantization.only(as_vector("is_kept", is_kept, np.bool_))
        return NativeQuantization(kept, self._num_quantiles, self._origin)

    @reads
    def sampler(
        self,
        *,
        batch_size: int,
        seed: int,
        mode: SamplingMode = SamplingMode.STRATIFIED,
        quantiles: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        age_half_life: float | None = None,
        max_uses: int | None = None,
        bucket_window: int = 1,
    ) -> NativeSampler:
        """A stream of minibatches over the ranked samples. Raises ValueError for a setting out of range."""
        settings = _SamplerSettings(
            batch_size=bounded("batch_size", batch_size, 32),
            seed=bounded("seed", seed, 64),
            mode=as_rule("mode", mode, SamplingMode),
            quantiles=None if quantiles is None else list(quantiles),
            rank=bounded("rank", rank, 32),
            world_size=bounded("world_size", world_size, 32),
            weights=None if age_half_life is None else age_weights(age_half_life),
            max_uses=None if max_uses is None else bounded("max_uses", max_uses, 32),
            bucket_window=bounded("bucket_window", bucket_window, 32),
        )
        return NativeSampler(self._quantization.sampler(settings), self._origin)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SamplerSettings:
    """Settings whose attributes the extension's sampler reads."""

    batch_size: int
    seed: int
    mode: str
    quantiles: list[int] | None
    rank: int
    world_size: int
    weights: list[int] | None
    max_uses: int | None
    bucket_window: int


def snapshot_of(snapshot: _pool_rs.Snapshot) -> Snapshot:
    """Convert a snapshot of the extension."""
    return Snapshot(
        generation=snapshot.generation, hash=snapshot.hash, num_samples=snapshot.num_samples
    )


def drawn_batch(batch: _pool_rs.PaddedBatch) -> PoolBatch:
    """Convert a padded batch of the extension."""
    drawn = batch.drawn
    return padded_batch(drawn.ids, drawn.quantiles, batch.tokens, drawn.scores)


def drawn_packed_batch(batch: _pool_rs.PackedBatch) -> PackedBatch:
    """Convert a packed batch of the extension."""
    drawn = batch.drawn
    return packed_batch(drawn.ids, drawn.quantiles, batch.tokens, drawn.scores)


def padded_batch(
    ids: NDArray[np.uint64],
    quantiles: NDArray[np.int16],
    tokens: _pool_rs.Padded,
    scores: NDArray[np.float32],
) -> PoolBatch:
    """A batch from padded token ids of the extension."""
    return PoolBatch(
        ids=ids,
        quantiles=quantiles,
        prompt_tokens=tokens.prompts,
        prompt_lengths=tokens.prompt_lengths,
        completion_tokens=tokens.completions,
        completion_lengths=tokens.completion_lengths,
        scores=scores,
    )


def packed_batch(
    ids: NDArray[np.uint64],
    quantiles: NDArray[np.int16],
    tokens: _pool_rs.Packed,
    scores: NDArray[np.float32],
) -> PackedBatch:
    """A batch from packed token ids of the extension."""
    return PackedBatch(
        ids=ids,
        quantiles=quantiles,
        prompt_tokens=tokens.prompts,
        prompt_offsets=tokens.prompt_offsets,
        completion_tokens=tokens.completions,
        completion_offsets=tokens.completion_offsets,
        scores=scores,
    )


def unranked(ids: NDArray[np.uint64]) -> NDArray[np.int16]:
    """[B] labels of samples without a ranking: -1."""
    return np.full(len(ids), -1, np.int16)


def unscored(ids: NDArray[np.uint64]) -> NDArray[np.float32]:
    """[B] scores of samples without a ranking: NaN."""
    return np.full(len(ids), np.nan, np.float32)


def padded_into(
    out: BatchBuffers,
    write: Callable[[_Place, int | None, BatchBuffers], _pool_rs.Filled],
    place: _Place,
    pad_id: int,
) -> PoolBatch:
    """The padded batch that ``write`` writes to ``out``."""
    filled = _written_into(out, write, place, pad_id)
    return out.padded(filled.num_rows, filled.prompts, filled.completions)


def packed_into(
    out: BatchBuffers,
    write: Callable[[_Place, int | None, BatchBuffers], _pool_rs.Filled],
    place: _Place,
) -> PackedBatch:
    """The packed batch that ``write`` writes to ``out``."""
    filled = _written_into(out, write, place, None)
    return out.packed(filled.num_rows, filled.prompts, filled.completions)


def _written_into(
    out: BatchBuffers,
    write: Callable[[_Place, int | None, BatchBuffers], _pool_rs.Filled],
    place: _Place,
    pad_id: int | None,
) -> _pool_rs.Filled:
    try:
        return write(place, pad_id, out)
    except TypeError as error:
        raise ValueError(
            f"out does not hold writable contiguous vectors of the types of BatchBuffers: {error}"
        ) from error
