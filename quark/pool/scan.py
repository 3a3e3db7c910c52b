"""A pool as a ``polars.LazyFrame``: one row per sample of a pinned snapshot.

The columns are those of ``quark.pool.base.Sample``, then ``key``, then the score columns under their own names
(``score:<name>`` if the name is taken). Missing scores and log-probabilities are null, because a NaN would pass every
``>`` of polars and poison every mean.

A query reads only what it needs. Ids, keys, rounds, chunks and scores are known without reading a segment, and policy
steps from one sample of each append. The parts of the predicate that use only these columns decide which segments to
read. Of those segments, only the columns in the query are read.

Damage raises an error. Every value comes from the extension, copied from the bytes that it checked. Only the
extension opens files, so replacing a file later does not change an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Protocol, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.io.plugins import register_io_source

from quark._pool_rs import SAMPLE_COLUMNS
from quark.pool.base import Sample
from quark.pool.info import PoolSettings
from quark.pool.sample_columns import NUMBER_COLUMNS
from quark.pool.segments import Appended, Segment, segments_of

SCORE_PREFIX = "score:"
"""Prefix of a score column whose name is taken."""

_TYPES: dict[str, pl.DataType] = {
    "id": pl.UInt64(),
    "prompt_text": pl.String(),
    "prompt_tokens": pl.List(pl.UInt32()),
    "prompt_metadata": pl.String(),
    "completion_tokens": pl.List(pl.UInt32()),
    "completion_text": pl.String(),
    "settings": pl.String(),
} | {column.name: pl.Series(np.empty(0, column.dtype)).dtype for column in NUMBER_COLUMNS}

COLUMNS: dict[str, pl.DataType] = {
    **{field.name: _TYPES[field.name] for field in fields(Sample) if field.name != "scores"},
    "key": pl.String(),
}
"""The columns of every pool, in the types of their values."""
SCANNED = COLUMNS | dict.fromkeys(
    ("id", "prompt_id", "finish_reason", "round", "chunk", "policy_step"), pl.Int64()
)
"""The columns of a scan, in signed types, because differences can be negative. Float32 score columns follow."""

_IN_MANIFEST = ("key", "round", "chunk")
_IN_SEGMENT = {
    column.shown: column.name
    for column in SAMPLE_COLUMNS
    if column.shown is not None and column.shown not in _IN_MANIFEST
} | {"completion_text": "completion_text"}
"""Column -> its name in the segment files."""
_LOOKED_UP = {
    "prompt_text": "prompt",
    "prompt_tokens": "prompt",
    "prompt_metadata": "prompt",
    "settings": "settings",
}
"""Column -> the segment files' column with the number of the interned value."""

_ROWS_AT_ONCE = 32_768


class Scannable(Appended, Protocol):
    """The part of a pool on disk that a scan reads."""

    @property
    def settings(self) -> PoolSettings:
        """The settings that the pool was created with."""
        ...

    @property
    def score_columns(self) -> tuple[str, ...]:
        """Names of the score columns, each a column of the scan."""
        ...

    @property
    def num_removed(self) -> int:
        """Ids below this were removed. The scan begins there."""
        ...

    @property
    def absent_columns(self) -> frozenset[str]:
        """Columns that the pool's version of the format lacks."""
        ...

    def __len__(self) -> int: ...
    def reopen(self) -> Self:
        """Another handle on the same snapshot, for reading."""
        ...

    def scores(self, name: str) -> NDArray[np.float32]:
        """[N] a score column in id order."""
        ...

    def samples(self, ids: Sequence[int]) -> list[Sample]:
        """The samples with these ids, in the order given."""
        ...

    def arrow_rows(self, spans: Sequence[range], columns: Sequence[str]) -> bytes:
        """An Arrow file with one row for each id in ``spans``, holding ``columns`` of the segment files."""
        ...


def scan(pool: Scannable) -> pl.LazyFrame:
    """The samples of ``pool.snapshot``. Later appends or a close do not affect them.

    Returns:
        One row per sample in id order: ``SCANNED``, then one Float32 column per score column. Collecting it needs
        memory for the result and 4 bytes per sample for each score column in the query.

    Raises:
        PoolCorruptedError: The manifest is damaged. Damaged samples raise it when they are read.
    """
    # A separate handle, because the given one may be refreshed or closed.
    pinned = pool.reopen()
    source = _Source(pinned, segments_of(pinned))
    return register_io_source(source.read, schema=source.schema, validate_schema=True, is_pure=True)


def score_column(name: str) -> str:
    """The name of a score column in a scan."""
    return SCORE_PREFIX + name if name in COLUMNS else name


class _Source:
    """The source that polars calls to read a pool."""

    def __init__(self, pool: Scannable, segments: Sequence[Segment]) -> None:
        self._pool = pool
        self._segments = segments
        self._starts = np.array([segment.first for segment in segments], np.int64)
        self._manifest = pl.DataFrame(
            {name: [getattr(segment, name) for segment in segments] for name in _IN_MANIFEST},
            schema={name: SCANNED[name] for name in _IN_MANIFEST},
        )
        self._score_names = {score_column(name): name for name in pool.score_columns}
        self.schema = SCANNED | dict.fromkeys(self._score_names, pl.Float32())

    def read(
        self,
        with_columns: list[str] | None,
        predicate: pl.Expr | None,
        n_rows: int | None,
        batch_size: int | None,
    ) -> Iterator[pl.DataFrame]:
        """Frames of at most ``batch_size`` rows: of the first ``n_rows`` samples those that ``predicate`` keeps."""
        wanted = list(self.schema) if with_columns is None else with_columns
        tested = set() if predicate is None else set(predicate.meta.root_names())
        needed = [name for name in self.schema if name in tested or name in wanted]
        of_appends = self._of_appends(with_policy_step="policy_step" in tested)
        known = {"id", *of_appends.columns, *self._score_names}
        if not self._pool.settings.store_text:
            known.add("completion_text")
        known |= self._pool.absent_columns
        conditions = [] if predicate is None else _conjuncts(predicate)
        early = [
            condition for condition in conditions if known.issuperset(condition.meta.root_names())
        ]
        scores = {
            name: self._pool.scores(score)
            for name, score in self._score_names.items()
            if name in needed
        }
        unknown = [name for name in needed if name not in known]

        first, end = self._pool.num_removed, len(self._pool)
        end = end if n_rows is None else min(first + n_rows, end)
        step = min(batch_size or _ROWS_AT_ONCE, _ROWS_AT_ONCE)
        for start in range(first, end, step):
            ids = range(start, min(start + step, end))
            facts = self._known(ids, [name for name in needed if name in known], of_appends, scores)
            kept = _kept(facts, early, len(ids))
            spans = [
                span
                for span in (_narrowed(part, kept, start) for part in self._by_segment(ids))
                if span is not None
            ]
            if not spans:
                continue
            rows = np.concatenate([np.arange(span.start, span.stop) for span in spans])
            read = self._read(spans, rows, unknown)
            rows -= start
            frame = pl.concat([facts[rows], read], how="horizontal")
            yield (frame if predicate is None else frame.filter(predicate)).select(wanted)

    def _by_segment(self, ids: range) -> Iterator[range]:
        at = int(np.searchsorted(self._starts, ids.start, side="right")) - 1
        while at < len(self._segments) and self._segments[at].first < ids.stop:
            segment = self._segments[at]
            yield range(max(ids.start, segment.first), min(ids.stop, segment.first + segment.count))
            at += 1

    def _read(
        self, spans: Sequence[range], ids: NDArray[np.int64], names: Sequence[str]
    ) -> pl.DataFrame:
        """Columns that only the segments know, of the ids of some spans. Raises PoolCorruptedError."""
        if not names:
            return pl.DataFrame()
        stored = list(dict.fromkeys(_IN_SEGMENT.get(name) or _LOOKED_UP[name] for name in names))
        rows = pl.read_ipc(self._pool.arrow_rows(spans, stored))
        looked_up = {
            number: self._samples(rows[number], ids)
            for number in {_LOOKED_UP[name] for name in names if name in _LOOKED_UP}
        }
        return pl.DataFrame([_column(name, rows, looked_up) for name in names])

    def _samples(
        self, numbers: pl.Series, ids: NDArray[np.int64]
    ) -> tuple[list[Sample], NDArray[np.intp]]:
        """One sample for each distinct number, and which of them stands for which row."""
        _, rows, of_row = np.unique(numbers.to_numpy(), return_index=True, return_inverse=True)
        return self._pool.samples(ids[rows].tolist()), of_row

    def _of_appends(self, *, with_policy_step: bool) -> pl.DataFrame:
        """One row per segment: what all its samples share, because they came in one append."""
        if not with_policy_step:
            return self._manifest
        first_samples = self._pool.samples(self._starts.tolist())
        steps = [sample.policy_step for sample in first_samples]
        return self._manifest.with_columns(
            pl.Series("policy_step", steps, dtype=SCANNED["policy_step"])
        )

    def _known(
        self,
        ids: range,
        names: Sequence[str],
        of_appends: pl.DataFrame,
        scores: dict[str, NDArray[np.float32]],
    ) -> pl.DataFrame:
        """What is known of samples without reading their segments."""
        numbers = np.arange(ids.start, ids.stop)
        of_segment = np.searchsorted(self._starts, numbers, side="right") - 1
        # The row numbers keep the height of a frame that has no other column.
        columns = [pl.Series("", numbers)]
        for name in names:
            if name == "id":
                columns.append(pl.Series(name, numbers))
            elif name in of_appends.columns:
                columns.append(of_appends[name][of_segment])
            elif name in scores:
                columns.append(pl.Series(name, scores[name][ids.start : ids.stop]).fill_nan(None))
            else:  # the texts of a pool that stores none, or what an older format has no column for
                columns.append(pl.Series(name, [None] * len(ids), dtype=SCANNED[name]))
        return pl.DataFrame(columns)


def _column(
    name: str,
    rows: pl.DataFrame,
    looked_up: dict[str, tuple[list[Sample], NDArray[np.intp]]],
) -> pl.Series:
    dtype = SCANNED[name]
    if name in _LOOKED_UP:
        samples, of_row = looked_up[_LOOKED_UP[name]]
        values = [getattr(sample, name) for sample in samples]
        if name == "prompt_tokens":
            values = [tokens.tolist() for tokens in values]
        return pl.Series(name, values, dtype=dtype)[of_row]
    column = rows[_IN_SEGMENT[name]].alias(name).cast(dtype)
    return column.fill_nan(None) if dtype == pl.Float32 else column


def _conjuncts(predicate: pl.Expr) -> list[pl.Expr]:
    """The conditions that must all hold."""
    inputs = predicate.meta.pop()
    if len(inputs) == 2:
        right, left = inputs
        if predicate.meta.eq(left & right):
            return _conjuncts(left) + _conjuncts(right)
    return [predicate]


def _kept(facts: pl.DataFrame, conditions: Sequence[pl.Expr], size: int) -> NDArray[np.bool_]:
    """Which rows fulfil all the conditions."""
    if not conditions:
        return np.ones(size, np.bool_)
    # Beside the facts, since a condition without a column, as polars makes of 1 = 1, has a height of one.
    fulfilled = facts.with_columns(pl.all_horizontal(conditions).fill_null(False).alias(""))
    return fulfilled.get_column("").to_numpy()


def _narrowed(ids: range, kept: NDArray[np.bool_], start: int) -> range | None:
    """The span of the ids that are kept, None without any; ``kept`` begins at the id ``start``."""
    rows = np.flatnonzero(kept[ids.start - start : ids.stop - start])
    if rows.size == 0:
        return None
    return ids[int(rows[0]) : int(rows[-1]) + 1]
