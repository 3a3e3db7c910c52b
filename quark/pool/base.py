"""The contract of a sample pool, which the Rust pool and its specification in plain Python implement.

The pool stores raw scores. It never stores a label ("this sample is in quantile k"): a label is a view of
(snapshot, number of quantiles, score column, tie rule, remainder rule).

A ranking orders samples by descending score (-0.0 equals 0.0), and equal scores by the tie rule. NaN is never ranked
and gets the label -1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from quark.pool.batch import BatchBuffers, PackedBatch
from quark.pool.batch import PoolBatch as PoolBatch
from quark.pool.columns import REWARD_COLUMN
from quark.pool.scope import Scope, Score

_Batch = TypeVar("_Batch", covariant=True)

MAX_AGE_HALF_LIFE = 10_000
"""In rounds. A longer half-life would draw all samples almost equally often."""


class TieRule(StrEnum):
    """How to order equal scores if a quantile boundary falls among them."""

    HASH = "hash"
    """By a hash of the sample id, seeded per pool, so that the label does not depend on age."""
    OLDER_FIRST = "older_first"
    """Older samples rank higher (the published code's stable sort)."""
    TOGETHER = "together"
    """The block is not cut. All of it goes to the highest quantile that it touches."""


class RemainderRule(StrEnum):
    """Which quantiles get the remaining N mod K samples."""

    SPREAD = "spread"
    """Quantile k holds the ascending ranks floor(k N / K) .. floor((k + 1) N / K): sizes differ by at most 1."""
    LOWEST = "lowest"
    """Quantile 0 gets all of them (the published code). With N < K every sample is in quantile 0."""


class SamplingMode(StrEnum):
    """How a sampler chooses the quantiles of a batch."""

    STRATIFIED = "stratified"
    """Equal counts (within one) per non-empty quantile, each quantile walked without replacement."""
    IID = "iid"
    """k uniform over the non-empty quantiles, then a sample of it, with replacement (Lu et al. 2022, eq. 1)."""
    SHUFFLE = "shuffle"
    """Epochs over all ranked samples in a keyed permutation, without strata (the published code)."""


def age_weights(half_life: float) -> list[int]:
    """Weights by age in rounds: floor(2**20 * 2**(-age / half_life)), up to the first 0; see ``Sampler``.

    Raises:
        ValueError: ``half_life`` is not above 0 and at most 10,000 rounds.
    """
    if not 0 < half_life <= MAX_AGE_HALF_LIFE:
        raise ValueError(
            f"age_half_life is {half_life}; it is above 0 and at most {MAX_AGE_HALF_LIFE} rounds"
        )
    weights = (math.floor(2.0 ** (20 - age / half_life)) for age in itertools.count())
    return list(itertools.takewhile(bool, weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """A prompt. The pool stores it once, whatever the number of its samples."""

    token_ids: NDArray[np.uint32]
    """[P] ids."""
    text: str
    metadata: str = "{}"
    """User metadata as one JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptColumns(Sequence[PromptRecord]):
    """U prompts as columns, the fastest form for an append of thousands of prompts.

    Raises:
        ValueError: the columns have different lengths, or ``offsets`` do not fit ``token_ids``.
    """

    token_ids: NDArray[np.uint32]
    """[sum of lengths] ids of all prompts, concatenated."""
    offsets: NDArray[np.int64]
    """[U + 1] where each prompt begins in ``token_ids``."""
    texts: Sequence[str] | None = None
    """U texts, or None if all are empty."""
    metadata: Sequence[str] | None = None
    """U JSON objects of the user, or None if all are empty."""

    def __post_init__(self) -> None:
        offsets = np.asarray(self.offsets)
        ends = (0, len(self.token_ids))
        if not len(offsets) or (offsets[0], offsets[-1]) != ends or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"offsets of prompts do not lead from 0 to the {len(self.token_ids)} token_ids"
            )
        for name, column in (("texts", self.texts), ("metadata", self.metadata)):
            if column is not None and len(column) != len(self):
                raise ValueError(f"{name} has {len(column)} entries for {len(self)} prompts")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> PromptRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptRecord]: ...
    def __getitem__(self, index: int | slice) -> PromptRecord | list[PromptRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        at = range(len(self))[index]
        return PromptRecord(
            token_ids=self.token_ids[self.offsets[at] : self.offsets[at + 1]],
            text="" if self.texts is None else self.texts[at],
            metadata="{}" if self.metadata is None else self.metadata[at],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleBatch:
    """N samples to append in one commit."""

    key: str
    """Idempotency key, for example ``"<run id>/<round>/<chunk>"``. A known key is not appended again."""
    prompts: Sequence[PromptRecord]
    """The U distinct prompts of the batch, as records or as ``PromptColumns``. The pool recognizes prompts that it
    already has by their content."""
    prompt_index: NDArray[np.uint32]
    """[N] index into ``prompts``."""
    completion_tokens: NDArray[np.uint32]
    """[sum of lengths] token ids of all completions, concatenated, as sampled."""
    completion_offsets: NDArray[np.int64]
    """[N + 1] where each completion begins in ``completion_tokens``."""
    completion_texts: Sequence[str] | None
    """N texts, or None for a pool that stores no text."""
    finish_reasons: NDArray[np.uint8]
    """[N] ``FinishReason`` values."""
    round: int
    chunk: int
    policy_step: int
    """Optimizer steps that the sampling policy had taken."""
    reward_tokens: NDArray[np.int16]
    """[N] quantile whose token conditioned the sampling, -1 for none."""
    settings: str
    """Sampling settings as one JSON object. Each distinct value is stored once."""
    seeds: NDArray[np.uint64]
    """[N] seeds."""
    logprob_policy: NDArray[np.float32] | None = None
    """[N] nats, NaN = not computed; None for none of them."""
    logprob_reference: NDArray[np.float32] | None = None
    """[N] nats, NaN = not computed; None for none of them."""
    logprob_sampled: NDArray[np.float32] | None = None
    """[N] nats under the distribution that the completion was drawn from, NaN = not known; None for none of them."""
    scores: Mapping[str, NDArray[np.float32]]
    """Score column name -> [N] values, NaN = not scored. Names match ``[a-z0-9_.-]{1,64}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A commit. A reader can keep it open for as long as it needs."""

    generation: int
    """Number of commits so far; 0 is the empty pool."""
    hash: str
    """Hex SHA-256 of the manifest chain up to this commit."""
    num_samples: int
    """Number of ids assigned so far. All ids are below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """Result of a retention, or of its dry run."""

    num_appends: int
    """Number of appends removed."""
    num_samples: int
    """Number of their samples."""
    num_removed: int
    """Number of samples removed in total. Ids below this are no longer in the pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One stored sample with all its columns."""

    id: int
    prompt_id: int
    prompt_text: str
    prompt_tokens: NDArray[np.uint32]
    prompt_metadata: str
    completion_tokens: NDArray[np.uint32]
    completion_text: str | None
    finish_reason: int
    round: int
    chunk: int
    policy_step: int
    reward_token: int
    settings: str
    seed: int
    logprob_policy: float
    logprob_reference: float
    logprob_sampled: float
    scores: Mapping[str, float]


class BatchStream(Protocol[_Batch]):
    """Batches that are prepared ahead. The thread ends when the stream is closed or garbage-collected."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> _Batch: ...

    def close(self) -> None:
        """Stop the stream and wait for its thread to end."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class Sampler(Protocol):
    """A stateless stream of minibatches: batch t is a pure function of (quantization, settings, seed, t).

    Batch t consists of the slots t B .. (t + 1) B - 1 of an endless sequence. In the stratified mode the S non-empty
    quantiles take turns: slot s is turn floor(s / S) of quantile s mod S. A quantile is walked epoch by epoch, each
    epoch in its own keyed permutation.

    ``age_half_life`` h: let a quantile hold c_i samples of its round i, newest first, and let a_i be that
    round's age in rounds behind the newest of the quantile. A sample weighs w_i = floor(2**20 * 2**(-a_i / h))
    (``age_weights``). An epoch takes q_i = floor((c_0 w_0 + .. + c_i w_i) / 2**20) - floor((c_0 w_0 + ..
    + c_(i-1) w_(i-1)) / 2**20) samples of round i: all of the newest round, half of a round that is h rounds older,
    and none if the share rounds to 0. The samples of a round are walked without replacement, continuing where the
    previous epoch stopped. The counts per quantile stay exact. Age only decides which samples are drawn.

    ``max_uses`` m: a quantile takes no more turns after m epochs, so one sampler draws no sample more than m times.
    The remaining quantiles share its slots. When fewer than B slots remain, there is no further batch;
    ``num_batches`` gives the number of batches.

    ``bucket_window`` W: the batches vW .. (v + 1)W - 1 together hold the same samples as without it, and each batch
    has the same count per quantile. Within a quantile, samples are distributed by the length of their completions (by
    slot if equal), and the batches receive their shares in a random order per window. Batches then have similar
    lengths and need little padding.
    """

    @property
    def num_batches(self) -> int | None:
        """Number of batches with ``max_uses``; None without it."""
        ...

    def draw(self, step: int) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
        """Ids [B] and quantiles [B] of batch ``step``. Raises ValueError beyond the last batch."""
        ...

    def batch(self, step: int, *, pad_id: int, out: BatchBuffers | None = None) -> PoolBatch:
        """Batch ``step``, gathered and padded. With ``out``, the arrays are views of the caller's memory.

        Raises:
            ValueError: ``out`` is too small or has other types.
            PoolCorruptedError: samples are damaged. The content of ``out`` is then undefined.
        """
        ...

    def packed(self, step: int, *, out: BatchBuffers | None = None) -> PackedBatch:
        """Batch ``step``, gathered without padding; otherwise like ``batch``."""
        ...

    def stream(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        pad_id: int,
        depth: int = 2,
        out: Sequence[BatchBuffers] = (),
    ) -> BatchStream[PoolBatch]:
        """The batches ``start`` .. ``stop`` - 1, padded, prepared by a thread of the pool.

        Args:
            start: first batch.
            stop: end of the range. None continues to the last batch, or forever.
            pad_id: token id that fills the rows.
            depth: number of batches to prepare ahead, at least 1. The thread sleeps when it is that far ahead.
            out: buffers of the caller that batches are copied into in turn. A batch stays valid until ``len(out)``
                batches later. Without buffers, every batch has arrays of its own.

        Raises:
            ValueError: from the iterator: beyond the last batch, or ``out`` does not fit.
            PoolCorruptedError: from the iterator, after all batches before the damage.
            PoolError: from the iterator, in a child process that was forked after the stream was created.
        """
        ...

    def packed_stream(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        depth: int = 2,
        out: Sequence[BatchBuffers] = (),
    ) -> BatchStream[PackedBatch]:
        """The same without padding."""
        ...


class Quantization(Protocol):
    """The ranking of one snapshot, cut into quantiles."""

    @property
    def num_quantiles(self) -> int:
        """Number K of quantiles, empty ones included."""
        ...

    @property
    def snapshot(self) -> Snapshot:
        """The commit whose samples are ranked."""
        ...

    @property
    def counts(self) -> NDArray[np.int64]:
        """[K] number of samples in each quantile."""
        ...

    @property
    def lower_bounds(self) -> NDArray[np.float32]:
        """[K] lowest score in each quantile; NaN for an empty one."""
        ...

    @property
    def num_unranked(self) -> int:
        """Number of samples whose score is NaN, without removed samples."""
        ...

    def labels(self) -> NDArray[np.int16]:
        """[N] quantile of each sample in id order, -1 for unranked ones. Takes one pass over the pool."""
        ...

    def labels_of(self, ids: NDArray[np.uint64]) -> NDArray[np.int16]:
        """[M] quantiles of some samples. Raises IndexError for an unknown or removed id."""
        ...

    def only(self, is_kept: NDArray[np.bool_]) -> Quantization:
        """The same quantiles with some of their samples. The others get the label -1 and are not drawn.

        Args:
            is_kept: [N] in id order. The boundaries still follow from all samples.

        Raises:
            ValueError: ``is_kept`` is not a vector of N booleans.
        """
        ...

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
    ) -> Sampler:
        """A stream of minibatches.

        Args:
            batch_size: B, over all ranks.
            seed: u64.
            mode: how to choose quantiles.
            quantiles: draw only from these; None draws from all.
            rank: rank of this process among those that share every batch. It gets the rows ``rank``,
                ``rank + world_size``, ... of the batch and reads no others.
            world_size: number of these processes, at most B.
            age_half_life: number of rounds after which a sample is drawn half as often; None draws all equally
                often. Only for the stratified mode.
            max_uses: maximum number of times that a sample is drawn; None for no limit. Not for iid.
            bucket_window: bucket by length across this many batches; 1 turns it off.

        Raises:
            ValueError: a setting is out of range, a quantile does not exist, or there is nothing to draw from.
        """
        ...


class SamplePool(Protocol):
    """An append-only store of samples; see ``docs/pool.md`` and ``quark_pool_rs/FORMAT.md``.

    ``retain`` removes the oldest samples. Ids do not change, so an array [N] in id order also has an entry for each
    removed sample: the score NaN, the label -1, and in a provenance column 0 (-1 in ``reward_token``, NaN in
    log-probabilities). A removed sample is not ranked and never drawn, and its id raises IndexError.
    """

    @property
    def path(self) -> Path | None:
        """The pool's directory; None for a pool in memory."""
        ...

    @property
    def snapshot(self) -> Snapshot:
        """The commit that this handle sees."""
        ...

    @property
    def score_columns(self) -> tuple[str, ...]:
        """Names of the published score columns, without drafts."""
        ...

    @property
    def num_removed(self) -> int:
        """Ids below this were removed by ``retain``."""
        ...

    @property
    def has_sampled_logprobs(self) -> bool:
        """Whether the pool stores ``logprob_sampled``. A pool of an older format shows NaN and refuses other values."""
        ...

    def __len__(self) -> int:
        """N, the number of assigned ids. ``num_removed`` of them are no longer in the pool."""
        ...

    def append(self, batch: SampleBatch) -> range:
        """Commit ``batch`` and return its ids. When this returns, the samples survive a power cut.

        For a key that the pool already has, this writes nothing and returns the ids of the first append.

        Raises:
            ValueError: arrays do not fit together, a token id is outside the vocabulary, or a name is invalid.
            PoolPoisonedError: an earlier sync failed. Reopen the pool.
            OSError: a disk operation failed. The pool is unchanged, unless a sync failed: then the samples may be
                there after reopening.
        """
        ...

    def find(self, key: str) -> range | None:
        """Ids that were appended under ``key``, even if they were removed since; None for an unknown key."""
        ...

    def refresh(self) -> Snapshot:
        """Move a reader to the newest commit."""
        ...

    def retain(
        self,
        *,
        max_samples: int | None = None,
        max_rounds: int | None = None,
        before_round: int | None = None,
        dry_run: bool = False,
    ) -> Retained:
        """Remove the oldest appends that exceed a limit, in one commit. At least one limit is required.

        Only whole appends are removed, until all limits hold. The newest append always stays. An append that a limit
        on rounds keeps also keeps all later ones. Drafts lose the removed samples.

        Args:
            max_samples: maximum number of samples to keep. A larger newest append stays.
            max_rounds: number of newest rounds to keep, counting rounds with samples.
            before_round: remove samples of earlier rounds.
            dry_run: report what would be removed without removing it.

        Raises:
            ValueError: there is no limit, or ``max_samples`` or ``max_rounds`` is below 1.
            PoolCorruptedError: a file that holds both removed and kept samples is damaged. Nothing was removed.
            PoolPoisonedError: an earlier sync failed. Reopen the pool.
            OSError: a disk operation failed. The pool is unchanged, unless a sync failed: then the samples may be
                gone after reopening.
        """
        ...

    def draft_end(self, name: str) -> int | None:
        """Ids below this have scores in the draft of a column, or were removed; None without a draft."""
        ...

    def draft_source(self, name: str) -> str | None:
        """The ``source`` that the draft was begun with; None without a draft."""
        ...

    def draft_scores(
        self, name: str, first: int, scores: NDArray[np.float32], *, source: str = "{}"
    ) -> None:
        """Commit more scores [M] of a draft, for the samples ``first`` .. ``first`` + M.

        A draft is an unfinished score column. It begins at the oldest sample and grows without gaps. No ranking sees it
        before ``publish_scores``. ``quark.pool.rescore`` uses it.

        Args:
            name: name of a new column, or of one to replace.
            first: the current end of the draft; ``num_removed`` (0 without removed samples) begins one.
            scores: NaN = not scored.
            source: describes the scorer as one JSON object. It must not change within a draft.

        Raises:
            ValueError: the scores do not begin at the end of the draft, extend beyond the last sample, or have another
                source.
            PoolPoisonedError: an earlier sync failed. Reopen the pool.
            OSError: a disk operation failed. The pool is unchanged, unless a sync failed: then the scores may be
                there after reopening.
        """
        ...

    def publish_scores(self, name: str) -> None:
        """Turn a draft that covers every sample into the column of its name, in one commit.

        Older snapshots still show the old scores. Raises the errors of ``draft_scores``.
        """
        ...

    def discard_scores(self, name: str) -> None:
        """Discard a draft. Raises ValueError if there is none, and the errors of ``draft_scores``."""
        ...

    def quantize(
        self,
        num_quantiles: int,
        *,
        score: Score = REWARD_COLUMN,
        scope: Scope | None = None,
        ties: TieRule = TieRule.HASH,
        remainder: RemainderRule = RemainderRule.SPREAD,
    ) -> Quantization:
        """Rank the snapshot and cut the ranking.

        Args:
            num_quantiles: K.
            score: a column, or a combination of columns.
            scope: which samples to rank, and against which; None ranks all against all.
            ties: how to order equal scores at a boundary.
            remainder: which quantiles get the remaining samples. Has no meaning with ``scope.per_prompt``.

        Raises:
            KeyError: a score column is unknown.
            ValueError: ``num_quantiles`` is below 1, the scope is invalid, or ``remainder`` was set with
                ``scope.per_prompt``.
        """
        ...

    def column(self, name: str) -> NDArray[Any]:
        """[N] a provenance column (``quark.pool.sample_columns.PROVENANCE_COLUMNS``) in id order. Raises KeyError."""
        ...

    def scores(self, name: str) -> NDArray[np.float32]:
        """[N] a score column in id order."""
        ...

    def samples(self, ids: Sequence[int]) -> list[Sample]:
        """Samples with all their columns. Raises IndexError for an unknown or removed id."""
        ...

    def gather(
        self, ids: NDArray[np.uint64], *, pad_id: int, out: BatchBuffers | None = None
    ) -> PoolBatch:
        """Some samples as a padded batch. ``quantiles`` are -1 and ``scores`` NaN. Otherwise like ``Sampler.batch``."""
        ...

    def gather_packed(
        self, ids: NDArray[np.uint64], *, out: BatchBuffers | None = None
    ) -> PackedBatch:
        """Some samples without padding; otherwise like ``gather``."""
        ...

    def close(self) -> None:
        """Release the resources of the handle, such as the writer's lock."""
        ...
