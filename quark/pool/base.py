"""What a sample pool is: the contract that the Rust pool and the plain-Python specification share.

A label ("this sample is in quantile k") is never stored: it is a view of (snapshot, number of
quantiles, score column, tie rule, remainder rule). What is stored are raw scores.

Order of the samples in a ranking: score descending (-0.0 equals 0.0), then, between equal scores, the
tie rule. NaN is never ranked and gets the label -1.
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
"""Rounds; longer ones draw all samples nearly alike."""


class TieRule(StrEnum):
    """How a block of equal scores is cut where a quantile boundary falls inside it."""

    HASH = "hash"
    """By a hash of the sample id seeded per pool, so that age does not leak into the label."""
    OLDER_FIRST = "older_first"
    """Older samples rank higher (the published code's stable sort)."""
    TOGETHER = "together"
    """Not at all: the whole block goes to the highest quantile that it touches."""


class RemainderRule(StrEnum):
    """Which quantiles get the N mod K samples that do not divide."""

    SPREAD = "spread"
    """Quantile k holds the ascending ranks floor(k N / K) .. floor((k + 1) N / K): sizes differ by at most 1."""
    LOWEST = "lowest"
    """All of them go to quantile 0 (the published code). With N < K every sample is in quantile 0."""


class SamplingMode(StrEnum):
    """How a sampler chooses the quantiles of a batch."""

    STRATIFIED = "stratified"
    """Exact counts (within one) per non-empty quantile, each quantile walked without replacement."""
    IID = "iid"
    """k uniform over the non-empty quantiles, then a sample of it, with replacement (Lu et al. 2022, eq. 1)."""
    SHUFFLE = "shuffle"
    """Epochs over all ranked samples in a keyed permutation (the published code); no strata."""


def age_weights(half_life: float) -> list[int]:
    """By age in rounds, floor(2**20 * 2**(-age / half_life)) up to where it is 0; see ``Sampler``.

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
    """A prompt as the pool stores it, once however many samples have it."""

    token_ids: NDArray[np.uint32]
    """[P] ids."""
    text: str
    metadata: str = "{}"
    """User metadata as one JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptColumns(Sequence[PromptRecord]):
    """U prompts as columns: what a batch of thousands is quickest appended from.

    Raises:
        ValueError: the columns are of different numbers of prompts, or ``offsets`` do not divide ``token_ids``.
    """

    token_ids: NDArray[np.uint32]
    """[sum of lengths] all prompts' ids one after another."""
    offsets: NDArray[np.int64]
    """[U + 1] where each prompt begins in ``token_ids``."""
    texts: Sequence[str] | None = None
    """U texts, or None where there are none: they are all empty."""
    metadata: Sequence[str] | None = None
    """U JSON objects of the user's, or None where they are all empty."""

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
    """Idempotency key, e.g. ``"<run id>/<round>/<chunk>"``: a key that is already there is not appended again."""
    prompts: Sequence[PromptRecord]
    """The U distinct prompts of the batch, as records or as ``PromptColumns``; ones the pool already has are
    recognised by content."""
    prompt_index: NDArray[np.uint32]
    """[N] index into ``prompts``."""
    completion_tokens: NDArray[np.uint32]
    """[sum of lengths] all completions one after another, as sampled."""
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
    """Sampling settings as one JSON object; stored once per distinct value."""
    seeds: NDArray[np.uint64]
    """[N] seeds."""
    logprob_policy: NDArray[np.float32]
    """[N] nats, NaN = not computed."""
    logprob_reference: NDArray[np.float32]
    """[N] nats, NaN = not computed."""
    logprob_sampled: NDArray[np.float32]
    """[N] nats under the distribution that the completion was drawn from, NaN = not known."""
    scores: Mapping[str, NDArray[np.float32]]
    """Score column name -> [N] values, NaN = not scored. Names match ``[a-z0-9_.-]{1,64}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A commit: what a reader sees for as long as it likes."""

    generation: int
    """Number of commits so far; 0 is the empty pool."""
    hash: str
    """Hex SHA-256 of the manifest chain up to this commit."""
    num_samples: int
    """Ids that were given out: ids are below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """What a retention removed, or would."""

    num_appends: int
    """Appends that went, whole; 0 where nothing had to."""
    num_samples: int
    """Their samples."""
    num_removed: int
    """Samples that are removed altogether: ids below this are no longer in the pool."""


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
    """Batches that are prepared ahead; ends its thread when it is closed, left or forgotten."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> _Batch: ...

    def close(self) -> None:
        """Wait for the thread to end; nothing comes after it."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class Sampler(Protocol):
    """A stateless stream of minibatches: batch t is a pure function of (quantization, settings, seed, t).

    It is the slots t B .. (t + 1) B - 1 of an endless sequence. In the stratified mode the S non-empty
    quantiles take the slots in turn, slot s being turn floor(s / S) of quantile s mod S. A quantile is
    walked epoch by epoch, each epoch in a keyed permutation of its own.

    ``age_half_life`` h: let a quantile hold c_i samples of its round i, newest first, and let a_i be that
    round's age in rounds behind the newest of the quantile. A sample weighs w_i = floor(2**20 * 2**(-a_i / h))
    (``age_weights``). An epoch takes q_i = floor((c_0 w_0 + .. + c_i w_i) / 2**20) - floor((c_0 w_0 + ..
    + c_(i-1) w_(i-1)) / 2**20) samples of round i: all of the newest, half of one that is h rounds older, none of one
    whose share rounds to nothing. The samples of a round are walked without replacement, each epoch going on
    where the one before stopped. So the quantiles stay exact, and only who of them is drawn depends on age.

    ``max_uses`` m: a quantile takes no more turns after m epochs, so that no sample is drawn more than m times by
    one sampler. The quantiles that remain share its slots in turn. Where fewer than B slots remain
    altogether, there is no further batch: ``num_batches`` says how many there are.

    ``bucket_window`` W: the batches vW .. (v + 1)W - 1 hold together the samples that they would hold
    without it, and each as many of each quantile; but within a quantile they are dealt by the length of their
    completions (by slot where equal), the batches taking their shares in an order drawn for each window. So
    batches are of like length and need little padding.
    """

    @property
    def num_batches(self) -> int | None:
        """How many batches there are with ``max_uses``; None without an end."""
        ...

    def draw(self, step: int) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
        """Ids [B] and quantiles [B] of batch ``step``. Raises ValueError beyond the last batch."""
        ...

    def batch(self, step: int, *, pad_id: int, out: BatchBuffers | None = None) -> PoolBatch:
        """Batch ``step``, gathered and padded; with ``out`` as views of the caller's memory.

        Raises:
            ValueError: ``out`` is too small, or of other types.
            PoolCorruptedError: what has to be read is damaged; ``out`` then holds nothing of use.
        """
        ...

    def packed(self, step: int, *, out: BatchBuffers | None = None) -> PackedBatch:
        """Batch ``step``, gathered without padding; else as ``batch``."""
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
        """The batches ``start`` .. ``stop`` - 1, padded, prepared by a thread of the pool's.

        Args:
            start: first batch.
            stop: where to end; None goes on to the last batch, or forever.
            pad_id: fills the rows.
            depth: batches that are prepared ahead, at least 1. The thread sleeps when it is that far ahead.
            out: memory of the caller's that the batches are copied into in turn, so that a batch stays as it
                is until ``len(out)`` later; without it every batch is an array of its own.

        Raises:
            ValueError: from the iterator: beyond the last batch, or ``out`` does not fit.
            PoolCorruptedError: from the iterator, once those before the damage have been given out.
            PoolError: from the iterator, in a child process that was forked after the stream was made.
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
        """[K] samples per quantile."""
        ...

    @property
    def lower_bounds(self) -> NDArray[np.float32]:
        """[K] lowest score in each quantile; NaN where it is empty."""
        ...

    @property
    def num_unranked(self) -> int:
        """Samples whose score is NaN; not those that were removed."""
        ...

    def labels(self) -> NDArray[np.int16]:
        """[N] quantile of each sample in id order, -1 for unranked ones. One pass over the pool."""
        ...

    def labels_of(self, ids: NDArray[np.uint64]) -> NDArray[np.int16]:
        """[M] quantiles of some samples. Raises IndexError for an id that the snapshot lacks, or that was removed."""
        ...

    def only(self, is_kept: NDArray[np.bool_]) -> Quantization:
        """The same quantiles with some of their samples. The others get the label -1 and are not drawn.

        Args:
            is_kept: [N] in id order. The cuts stay where all samples put them.

        Raises:
            ValueError: ``is_kept`` is no vector of N booleans.
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
            batch_size: B, of all ranks together.
            seed: u64.
            mode: how quantiles are chosen.
            quantiles: draw from these alone; None draws from all.
            rank: of the processes that share every batch, this one: it gets the rows ``rank``,
                ``rank + world_size``, ... of the batch and reads no other.
            world_size: how many there are, at most B.
            age_half_life: rounds after which a sample is drawn half as often; None draws all alike. Only
                stratified.
            max_uses: how often a sample is drawn at most; None as often as it comes. Not iid.
            bucket_window: batches among which samples are dealt by length; 1 leaves them where they are.

        Raises:
            ValueError: a setting out of range, a quantile that is not there, or nothing to draw from.
        """
        ...


class SamplePool(Protocol):
    """An append-only store of samples; see ``docs/pool.md`` and ``quark_pool_rs/FORMAT.md``.

    ``retain`` removes the oldest samples. Ids stay what they are, so an array [N] in id order has an entry for
    a removed sample, too: the score NaN, the label -1, and in a provenance column 0 (-1 in ``reward_token``, NaN in
    log-probabilities). It is not ranked, never drawn, and asking for it by id raises IndexError.
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
        """Names of the published score columns; drafts are not among them."""
        ...

    @property
    def num_removed(self) -> int:
        """Ids below this were removed by ``retain``."""
        ...

    @property
    def has_sampled_logprobs(self) -> bool:
        """Whether ``logprob_sampled`` is kept. A pool of an older format shows NaN and refuses any other value."""
        ...

    def __len__(self) -> int:
        """N, the number of ids that were given out; ``num_removed`` of them are no longer there."""
        ...

    def append(self, batch: SampleBatch) -> range:
        """Commit ``batch`` and return its ids; on return the samples survive a power cut.

        A key that the pool already has returns the ids it got the first time and writes nothing.

        Raises:
            ValueError: arrays that do not fit together, a token id outside the vocabulary, a bad name.
            PoolPoisonedError: an earlier sync failed; reopen.
            OSError: the disk refused. The pool is as before the call; where a sync failed it may be as after it, which
                reopening shows.
        """
        ...

    def find(self, key: str) -> range | None:
        """Ids that were appended under ``key``, also where they were removed since; or None."""
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
        """Remove the oldest appends, whole, in one commit; at least one limit is given.

        Where several are given, as many appends go as any of them asks for. The newest append always stays, and
        an append that a limit on rounds keeps keeps those after it. A draft does without the samples that go.

        Args:
            max_samples: so many samples stay at most (but for a newest append that is larger).
            max_rounds: of so many rounds, the newest that the pool has samples of.
            before_round: samples of earlier rounds go.
            dry_run: only say what would go.

        Raises:
            ValueError: no limit, or a ``max_samples`` or ``max_rounds`` < 1.
            PoolCorruptedError: a file that some samples of go and others stay in is damaged; nothing goes.
            PoolPoisonedError: an earlier sync failed; reopen.
            OSError: the disk refused. The pool is as before the call; where a sync failed it may be as after it, which
                reopening shows.
        """
        ...

    def draft_end(self, name: str) -> int | None:
        """Ids below this have scores in the unfinished draft of a column, or were removed; None without a draft."""
        ...

    def draft_source(self, name: str) -> str | None:
        """What makes the scores of a draft, as it was given; None without a draft."""
        ...

    def draft_scores(
        self, name: str, first: int, scores: NDArray[np.float32], *, source: str = "{}"
    ) -> None:
        """Commit more scores [M] of a draft: those of samples ``first`` .. ``first`` + M.

        A draft is a score column in the making: it begins at the oldest sample, grows without gaps and is seen by
        no ranking before ``publish_scores``. ``quark.pool.rescore`` drives it.

        Args:
            name: of the column that is to come, or whose next version is.
            first: where the draft ends so far; ``num_removed`` (0 where nothing was) begins one.
            scores: NaN = not scored.
            source: what makes the scores, as one JSON object, the same for all of a draft.

        Raises:
            ValueError: scores that do not go on where the draft ends, beyond the last sample, or of another
                source.
            PoolPoisonedError: an earlier sync failed; reopen.
            OSError: the disk refused. The pool is as before the call; where a sync failed it may be as after it, which
                reopening shows.
        """
        ...

    def publish_scores(self, name: str) -> None:
        """Make a draft that covers every sample the column of its name, in one commit.

        Snapshots of before go on showing the scores of before. Raises as ``draft_scores``.
        """
        ...

    def discard_scores(self, name: str) -> None:
        """Give a draft up. Raises ValueError if there is none, else as ``draft_scores``."""
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
            score: a column, or a combination of some.
            scope: which samples, and against which; None ranks all against all.
            ties: how a block of equal scores is cut.
            remainder: who gets what does not divide; within prompts there is nothing to choose.

        Raises:
            KeyError: an unknown score column.
            ValueError: ``num_quantiles`` < 1, a bad scope, or ``remainder`` with ``scope.per_prompt``.
        """
        ...

    def column(self, name: str) -> NDArray[Any]:
        """[N] a provenance column (``quark.pool.scope.PROVENANCE_COLUMNS``) in id order. Raises KeyError."""
        ...

    def scores(self, name: str) -> NDArray[np.float32]:
        """[N] a score column in id order."""
        ...

    def samples(self, ids: Sequence[int]) -> list[Sample]:
        """Whole samples, for people and replay. Raises IndexError for an id that is not there, or was removed."""
        ...

    def gather(
        self, ids: NDArray[np.uint64], *, pad_id: int, out: BatchBuffers | None = None
    ) -> PoolBatch:
        """Some samples as a padded batch; ``quantiles`` are -1 and ``scores`` NaN. Else as ``Sampler.batch``."""
        ...

    def gather_packed(
        self, ids: NDArray[np.uint64], *, out: BatchBuffers | None = None
    ) -> PackedBatch:
        """Some samples without padding; else as ``gather``."""
        ...

    def close(self) -> None:
        """Give back what the handle holds, such as the writer's lock."""
        ...
