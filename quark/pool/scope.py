"""The scope of a ranking: a part of the samples, a combination of score columns, or each prompt separately.

Nothing of this is stored. A quantization computes one value per sample from columns of the pool, NaN for samples
that are not ranked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quark.pool.combiners import Ensemble
from quark.pool.rank_shares import rank_share
from quark.pool.sample_columns import FLOAT_COLUMNS, PROVENANCE_COLUMNS
from quark.pool.scrambling import scramble_all
from quark.printable import printable

if TYPE_CHECKING:
    import polars as pl


class Columns(Protocol):
    """The part of a pool that a ranking by values reads."""

    @property
    def score_columns(self) -> Sequence[str]:
        """Names of the score columns."""
        ...

    @property
    def num_removed(self) -> int:
        """Ids below this were removed and are never ranked."""
        ...

    def __len__(self) -> int: ...
    def scores(self, name: str) -> NDArray[np.float32]:
        """[N] a score column in id order, NaN where a sample has no score."""
        ...

    def column(self, name: str) -> NDArray[Any]:
        """[N] one of ``PROVENANCE_COLUMNS`` in id order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Which samples are ranked, and against which.

    Samples outside the scope are not ranked. Their label is -1 and no sampler draws them.
    """

    last_rounds: int | None = None
    """Rank only samples of this many newest rounds; None for all."""
    where: str | None = None
    """Rank only samples for which this SQL expression over provenance and score columns holds, for example
    ``logprob_reference > -60 AND reward_token = 4``. ``quark.pool.sql`` describes what is allowed."""
    min_score: float | None = None
    """Rank only samples whose ranked score is at least this (as a float32). With one quantile this is RAFT (Dong et al.
    2023) or a step of ReST (Gulcehre et al. 2023): fine-tuning on samples above a threshold."""
    max_per_round: int | None = None
    """Rank at most this many samples of each round: those with the smallest hash among all that meet the other
    conditions."""
    seed: int = 0
    """Seed of that hash, u64."""
    per_prompt: bool = False
    """Rank each sample among those of its own prompt, as in ALT (Abadal et al. 2024). Of n samples, the one with r
    worse ones gets the quantile floor((r + 1/2) K / n), so that a prompt with few samples favors neither end."""

    def __post_init__(self) -> None:
        if self.last_rounds is not None and self.last_rounds < 1:
            raise ValueError(f"last_rounds is {self.last_rounds}; at least 1 is needed")
        if self.max_per_round is not None and self.max_per_round < 1:
            raise ValueError(f"max_per_round is {self.max_per_round}; at least 1 is needed")
        if self.min_score is not None and math.isnan(self.min_score):
            raise ValueError("min_score is not a number: leave it out to rank every score")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and below 2**64")

    @property
    def is_everything(self) -> bool:
        """Whether all samples are ranked against each other."""
        return self == Scope(seed=self.seed)


class Combination(Protocol):
    """A score computed from several columns."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns to read."""
        ...

    def combine(self, scores: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """[N] values from one array [N] for each column; NaN where one of them is NaN."""
        ...


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """``sum_c weights[c] * score_c``. A negative weight is a penalty."""

    weights: Mapping[str, float]
    columns: Sequence[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.weights)
        object.__setattr__(self, "columns", tuple(self.weights))

    def combine(self, scores: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """[N] the weighted sum of the columns, in the order of ``weights``; NaN where any score is NaN."""
        total = np.zeros(len(scores[0]))
        for weight, column in zip(self.weights.values(), scores, strict=True):
            total += weight * column.astype(np.float64)
        return total


@dataclass(frozen=True, slots=True)
class Lowest:
    """The lowest of the scores."""

    columns: Sequence[str]

    def __post_init__(self) -> None:
        _check(self.columns)

    def combine(self, scores: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """[N] the lowest of each sample's scores; NaN where any score is NaN."""
        return np.asarray(np.stack(scores).min(0), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class MeanMinusVariance:
    """Mean of an ensemble of scores, minus ``penalty`` times their variance."""

    columns: Sequence[str]
    penalty: float = 1.0

    def __post_init__(self) -> None:
        _check(self.columns)

    def combine(self, scores: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """[N] the mean minus the penalty times the population variance; NaN where any score is NaN."""
        stacked = np.stack(scores).astype(np.float64)
        return np.asarray(stacked.mean(0) - self.penalty * stacked.var(0))


@dataclass(frozen=True, slots=True)
class RankMean:
    """Mean over the columns of the share of samples that score lower (ties count half).

    It does not depend on the scales of the columns. Each column ranks the samples that it has a score for.
    """

    columns: Sequence[str]

    def __post_init__(self) -> None:
        _check(self.columns)

    def combine(self, scores: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """[N] the mean of each sample's rank shares, between 0 and 1; NaN where any score is NaN."""
        return np.asarray(np.stack([rank_share(column) for column in scores]).mean(0))


Score: TypeAlias = str | Combination
"""The name of a score column, or a combination of columns."""


def says_all(score: Score) -> bool:
    """Whether the ``repr`` of a score determines its values. This may not hold for a combination of the user."""
    return isinstance(score, str) or type(score) in (
        WeightedSum,
        Lowest,
        MeanMinusVariance,
        RankMean,
        Ensemble,
    )


def values_of(pool: Columns, score: Score, scope: Scope) -> NDArray[np.float32]:
    """[N] the values to rank by; NaN for a sample that is outside the scope, has no score or was removed.

    Raises:
        KeyError: a score column does not exist.
        TypeError: ``score`` is neither a name nor a combination.
        ValueError: ``where`` is not a condition on existing columns.
    """
    if isinstance(score, str):
        values = pool.scores(score)
    elif not callable(getattr(score, "combine", None)):
        raise TypeError(
            f"score is {score!r}; it must be a column's name or a combination of columns"
        )
    else:
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN: not scored
            combined = score.combine([pool.scores(name) for name in score.columns])
            values = np.asarray(combined, dtype=np.float32)
    is_inside = np.arange(len(pool)) >= pool.num_removed
    if scope.last_rounds is not None and len(pool):
        rounds = pool.column("round")
        is_inside &= rounds >= np.unique(rounds[pool.num_removed :])[-scope.last_rounds :][0]
    if scope.where is not None:
        is_inside &= _holds(pool, scope.where)
    if scope.min_score is not None:
        is_inside &= values >= np.float32(scope.min_score)
    if scope.max_per_round is not None:
        is_inside &= ~np.isnan(values)
        is_inside &= _within_quota(pool.column("round"), is_inside, scope.max_per_round, scope.seed)
    return np.where(is_inside, values, np.float32(np.nan))


def scores_by(pool: Columns, score: Score) -> NDArray[np.float32]:
    """[N] a score column, or the values of a combination, in id order; NaN where a sample has none.

    Raises:
        KeyError: a score column does not exist.
    """
    return pool.scores(score) if isinstance(score, str) else values_of(pool, score, Scope())


def refuse_remainder(scope: Scope, remainder: str) -> None:
    """Raise ValueError for a ranking within prompts with a remainder rule other than the default."""
    if scope.per_prompt and remainder != "spread":
        raise ValueError(f"remainder = {remainder!r} has no meaning within prompts: leave it out")


def condition_of(where: str, score_columns: Sequence[str]) -> tuple[pl.Expr, list[str]]:
    """Parse an SQL condition: the expression and the names of its columns.

    Raises:
        ValueError: ``quark.pool.sql.condition`` refuses it, or it names no column.
    """
    from quark.pool.sql import condition

    try:
        expression = condition(where, (*PROVENANCE_COLUMNS, *score_columns))
    except ValueError as error:
        raise ValueError(f"{_named(where)} {error}") from error
    names = sorted(set(expression.meta.root_names()))
    if not names:
        raise ValueError(
            f"{_named(where)} names no column; there are {', '.join((*PROVENANCE_COLUMNS, *score_columns))}"
        )
    return expression, names


def _named(where: str) -> str:
    return f"where = {printable(repr(where), limit=200)}"


def try_condition(where: str, score_columns: Sequence[str]) -> None:
    """Try a condition on two samples of zeros, before the pool exists.

    Raises:
        ValueError: as ``condition_of``; or the condition cannot be computed, or is not a boolean per sample.
    """
    import polars as pl

    condition, names = condition_of(where, score_columns)
    fractions = {*score_columns, *FLOAT_COLUMNS}
    kinds = {name: np.float32 if name in fractions else np.uint32 for name in names}
    _computed(condition, pl.DataFrame({k: np.zeros(2, kind) for k, kind in kinds.items()}), where)


def _holds(pool: Columns, where: str) -> NDArray[np.bool_]:
    import polars as pl

    condition, names = condition_of(where, pool.score_columns)
    # A missing score is NULL, so no condition on it holds. Sums and other aggregates skip it.
    data = {
        name: pool.column(name) if name in PROVENANCE_COLUMNS else pool.scores(name)
        for name in names
    }
    data = {name: values[pool.num_removed :] for name, values in data.items()}
    # Wide types, so that differences and products do not overflow: ``round - 3`` of round 0 is -3, not 2**32 - 3.
    frame = pl.DataFrame(data).with_columns(
        pl.selectors.float().fill_nan(None), pl.selectors.integer().cast(pl.Int128)
    )
    holds = _computed(condition, frame, where)
    removed = np.zeros(pool.num_removed, dtype=np.bool_)
    return np.concatenate([removed, holds.fill_null(value=False).to_numpy()])


def _computed(condition: pl.Expr, frame: pl.DataFrame, where: str) -> pl.Series:
    """Whether the condition holds for each row. Raises ValueError if it is not a condition."""
    import polars as pl

    from quark.pool.sql import reason_of

    try:
        holds = frame.select(condition).to_series()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ValueError(f"{_named(where)} cannot be computed: {reason_of(error)}") from error
    if holds.dtype != pl.Boolean or len(holds) != len(frame):
        raise ValueError(f"{_named(where)} is no condition on a sample")
    return holds


def _within_quota(
    rounds: NDArray[np.uint32], is_inside: NDArray[np.bool_], quota: int, seed: int
) -> NDArray[np.bool_]:
    """[N] whether a sample inside is among the ``quota`` of its round with the smallest ``scramble(seed, id)``."""
    ids = np.flatnonzero(is_inside)
    ids = ids[np.argsort(rounds[ids], kind="stable")]  # one pass if rounds are in order
    hashes = scramble_all(seed, ids)
    is_chosen = np.zeros(len(rounds), dtype=np.bool_)
    starts = np.flatnonzero(np.diff(rounds[ids], prepend=-1.0))
    for start, end in pairwise([*starts.tolist(), len(ids)]):
        own = hashes[start:end]
        if len(own) > quota:  # the hash is bijective, so no two are equal
            own = own < np.partition(own, quota)[quota]
        else:
            own = np.ones(len(own), dtype=np.bool_)
        is_chosen[ids[start:end]] = own
    return is_chosen


def _check(columns: Mapping[str, float] | Sequence[str]) -> None:
    if not columns or isinstance(columns, str):
        raise ValueError("a combination needs a list of at least one score column")
