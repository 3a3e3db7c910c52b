"""The columns of a sample in Python, all derived from the table in ``quark_pool_rs/src/columns.rs``.

A new column of an append takes a line in that table and an attribute in ``SampleBatch`` and ``Sample``. Everything
else follows from here: checks, defaults, scans, imports, exports and the pool in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quark._pool_rs import SAMPLE_COLUMNS


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberColumn:
    """A column with one number for each sample."""

    name: str
    """The attribute of ``Sample``, and the column of a scan."""
    dtype: np.dtype[Any]
    blank: int | float
    """Stands for a missing value and for the value of a removed sample."""
    since: int
    """First version of the pool's format that has the column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchColumn(NumberColumn):
    """A column whose values come with an append. The pool assigns the values of all others."""

    given: str
    """The attribute of ``SampleBatch``."""

    def values(self, batch: object, num_samples: int) -> NDArray[Any]:
        """[N] the values that ``batch`` has for this column; blanks if it has None."""
        values = getattr(batch, self.given)
        return np.full(num_samples, self.blank, self.dtype) if values is None else values


BATCH_COLUMNS = tuple(
    BatchColumn(
        name=column.shown,
        given=column.given,
        dtype=np.dtype(column.dtype),
        blank=column.blank,
        since=column.since,
    )
    for column in SAMPLE_COLUMNS
    if column.shown is not None and column.given is not None
)
"""The columns of numbers that come with an append."""

NUMBER_COLUMNS = tuple(
    NumberColumn(
        name=column.shown,
        dtype=np.dtype(column.dtype),
        blank=column.blank,
        since=column.since,
    )
    for column in SAMPLE_COLUMNS
    if column.shown is not None and column.dtype is not None
)
"""All columns of numbers, scores excepted."""

PROVENANCE_COLUMNS = tuple(column.name for column in NUMBER_COLUMNS)
"""Names of the columns of numbers that every sample has, besides its scores."""

FLOAT_COLUMNS = tuple(column.name for column in NUMBER_COLUMNS if column.dtype == np.float32)
"""Names of the columns of log-probabilities: float32, NaN if not known. A scan shows null instead of NaN."""
