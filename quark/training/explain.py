"""Explains the use of a sample: its origin, its rank, and the batches that held it.

None of this is stored. A round's ranking is a view of a pool snapshot. A batch is a function of that ranking, the
configuration, the seed and its number. Both are computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quark.config.load import load_config
from quark.config.schema import PoolSection, RunConfig
from quark.errors import ConfigError, RunDirectoryError
from quark.pool.base import Quantization, Sample, SamplePool, Snapshot
from quark.pool.columns import REWARD_COLUMN
from quark.pool.native import NativePool
from quark.pool.ranking import RankingRules
from quark.pool.segments import segments_of
from quark.pool.standards import Standards
from quark.run_directory import RunDirectory
from quark.run_identity import RunIdentity
from quark.training.loop.draws import first_snapshot_with, quantize, round_sampler, samples_at
from quark.training.loop.metrics import num_steps_logged, steps_left_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A sample's rank by one score column."""

    column: str
    score: float
    """NaN = not scored. The sample is then neither ranked nor in a quantile."""
    rank: int | None
    """1 + the number of samples with a higher score."""
    num_tied: int
    """Number of samples with the same score, itself included; 0 without a score."""
    num_scored: int
    quantile: int
    """0 is the lowest; -1 for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundUse:
    """The use of a sample in one round."""

    round: int
    snapshot: Snapshot
    """The pool that the round learned from."""
    quantile: int
    """Quantile in that snapshot: 0 is the lowest; -1 for none."""
    steps: tuple[int, ...]
    """Optimizer steps whose batch held the sample, counted over the whole run."""
    steps_to_come: tuple[int, ...]
    """The same for future steps of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All facts about one sample."""

    sample: Sample
    key: str
    """Idempotency key of its append."""
    snapshot: Snapshot
    """The newest snapshot, which ``standings`` refer to."""
    num_quantiles: int
    standings: tuple[Standing, ...]
    """One for each score column."""
    run: Path | None
    """The run directory; None for a pool without one. There are no ``rounds`` then."""
    rounds: tuple[RoundUse, ...]
    """The rounds since the sample was appended, without unknown ones."""
    num_rounds_unknown: int
    """Rounds since the sample was appended whose snapshot has expired or is ambiguous."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    directory: RunDirectory
    id: str
    config: RunConfig

    def rules(self) -> RankingRules:
        """How the run ranks its pool."""
        ensemble = None
        if self.config.reward.members:
            with contextlib.suppress(FileNotFoundError):
                ensemble = Standards.read(self.directory.standards).ensemble(self.config.combiner)
        return self.config.pool.ranking(ensemble=ensemble)


def explain(path: Path, sample_id: int, *, num_quantiles: int | None = None) -> Explanation:
    """Explain one sample of a pool.

    Args:
        path: a pool or a run directory. For a pool in a run (``RUN/pool``), the run is found.
        sample_id: id of the sample.
        num_quantiles: K of the standings; None for the run's K, or the default without a run. Rounds always use the
            run's K.

    Raises:
        IndexError: the pool has no such sample, or retention removed it.
        RunDirectoryError: the run's identity or configuration cannot be read.
        UnsafeFileError: one of these, or the pool, is a link out of the run.
        FileNotFoundError: there is no pool.
        PoolCorruptedError: the samples are damaged.
    """
    run = _run_around(path)
    with NativePool.open(path if run is None else run.directory.own(run.directory.pool)) as pool:
        if not 0 <= sample_id < len(pool):
            raise IndexError(
                f"the pool has no sample {sample_id}; it holds {len(pool)} samples, numbered from 0"
            )
        (sample,) = pool.samples([sample_id])
        rules = RankingRules() if run is None else run.rules()
        if num_quantiles is not None:
            rules = replace(rules, num_quantiles=num_quantiles)
        appends = segments_of(pool)
        rounds = (
            ()
            if run is None
            else _rounds(pool, {append.round for append in appends}, sample_id, run)
        )
        known = tuple(use for use in rounds if use is not None)
        return Explanation(
            sample=sample,
            key=next(append.key for append in reversed(appends) if append.first <= sample_id),
            snapshot=pool.snapshot,
            num_quantiles=rules.num_quantiles,
            standings=tuple(
                _standing(pool, sample_id, replace(rules, score=name, ensemble=None))
                for name in pool.score_columns
            ),
            run=None if run is None else run.directory.path,
            rounds=known,
            num_rounds_unknown=len(rounds) - len(known),
        )


def _run_around(path: Path) -> _Run | None:
    directory = RunDirectory.around(path)
    if not directory.is_run():
        return None
    run_id = RunIdentity.read(directory).run_id
    try:
        config = load_config(directory.own(directory.config)).config
    except (OSError, ConfigError) as err:
        raise RunDirectoryError(f"{directory.config} cannot be read: {err}") from err
    return _Run(directory=directory, id=run_id, config=config)


def _standing(pool: SamplePool, sample_id: int, rules: RankingRules) -> Standing:
    scores = pool.scores(rules.score)
    score = scores[sample_id]
    return Standing(
        column=rules.score,
        score=float(score),
        rank=None if np.isnan(score) else 1 + int((scores > score).sum()),
        num_tied=int((scores == score).sum()),
        num_scored=int((~np.isnan(scores)).sum()),
        quantile=_quantile_of(sample_id, quantize(pool, rules)),
    )


def _rounds(
    pool: SamplePool, numbers: set[int], sample_id: int, run: _Run
) -> tuple[RoundUse | None, ...]:
    """The rounds among ``numbers`` that could draw the sample; None for one that cannot be recomputed.

    Rounds whose samples were removed are left out: they ended before the sample was appended.
    """
    num_steps = num_steps_logged(run.directory.metrics)
    left_out = steps_left_out(run.directory.metrics)
    uses: list[RoundUse | None] = []
    for round in sorted(numbers):
        num_samples = samples_at(pool, run.id, run.config.run, round)
        if num_samples is None or sample_id >= num_samples:
            continue
        with first_snapshot_with(run.directory.pool, num_samples) as then:
            if not _ranks_as_at_first(then, num_samples, run.config.pool):
                uses.append(None)
                continue
            quantization = quantize(then, run.rules())
            steps = _steps_with(sample_id, then, quantization, run.config, round, left_out)
            uses.append(
                RoundUse(
                    round=round,
                    snapshot=then.snapshot,
                    quantile=_quantile_of(sample_id, quantization),
                    steps=tuple(step for step in steps if step < num_steps),
                    steps_to_come=tuple(step for step in steps if step >= num_steps),
                )
            )
    return tuple(uses)


def _ranks_as_at_first(then: NativePool, num_samples: int, section: PoolSection) -> bool:
    """Whether ``then`` ranks like the pool when it first held ``num_samples`` samples."""
    if len(then) != num_samples:
        return False
    if then.snapshot.generation > then.oldest_generation:
        return True
    # Snapshots before the oldest have expired. The oldest one ranks the same as they did if nothing was removed and
    # all scores were appended with their samples.
    return then.num_removed == 0 and all(
        column.version == 1 and not column.source
        for column in then.info().score_columns
        if column.name == REWARD_COLUMN or section.where is not None
    )


def _steps_with(
    sample_id: int,
    pool: SamplePool,
    quantization: Quantization,
    config: RunConfig,
    round: int,
    left_out: Mapping[int, int],
) -> list[int]:
    """Numbers of the steps of ``round`` that learn from the sample. ``left_out`` are steps that rounds skipped."""
    try:
        sampler = round_sampler(pool, quantization, config, round)
    except (ValueError, ConfigError):  # too few samples to draw from: the run stopped here
        return []
    steps = range(config.run.steps_per_round - left_out.get(round, 0))
    first = round * config.run.steps_per_round
    first -= sum(number for earlier, number in left_out.items() if earlier < round)
    return [first + step for step in steps if sample_id in sampler.draw(step)[0]]


def _quantile_of(sample_id: int, quantization: Quantization) -> int:
    return int(quantization.labels_of(np.array([sample_id], np.uint64))[0])
