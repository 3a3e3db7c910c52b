"""Why a sample was trained on: where it came from, how it ranks, and which batches held it.

Nothing of this is stored. A round's ranking is a view of the pool's snapshot, and a batch is a function
of that ranking, the configuration, the seed and its number, so both are computed again.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quark.config.load import load_config
from quark.config.schema import PoolSection, RunConfig
from quark.errors import ConfigError, RunDirectoryError
from quark.pool.base import Quantization, Sample, SamplePool, Snapshot
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.draws import (
    chunk_key,
    first_snapshot_with,
    quantize,
    round_sampler,
    samples_at,
)
from quark.training.metrics import num_steps_logged


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A sample's place in the order by one score column."""

    column: str
    score: float
    """NaN = not scored, and then neither ranked nor in a quantile."""
    rank: int | None
    """1 + the number of samples with a higher score."""
    num_tied: int
    """Samples with the same score, itself included; 0 where it has none."""
    num_scored: int
    quantile: int
    """0 lowest; -1 for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundUse:
    """What became of a sample in one round of learning."""

    round: int
    snapshot: Snapshot
    """The pool that the round learnt from."""
    quantile: int
    """In that snapshot; 0 lowest, -1 for none."""
    steps: tuple[int, ...]
    """Optimizer steps, counted over the whole run, whose batch held the sample."""
    steps_to_come: tuple[int, ...]
    """The same for steps that the run has not taken yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything that is known about one sample."""

    sample: Sample
    key: str | None
    """Idempotency key of the chunk that brought it; None where no run is known that could have made it."""
    snapshot: Snapshot
    """The pool that ``standings`` are of: the newest."""
    num_quantiles: int
    standings: tuple[Standing, ...]
    """One of each score column."""
    run: Path | None
    """The run directory; None for a pool without one, and then there are no ``rounds``."""
    rounds: tuple[RoundUse, ...]
    """Every round since the sample was there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    directory: RunDirectory
    id: str
    config: RunConfig


def explain(path: Path, sample_id: int, *, num_quantiles: int | None = None) -> Explanation:
    """Explain one sample of a pool.

    Args:
        path: a pool or a run directory; the run around a pool (``RUN/pool``) is found.
        sample_id: which sample.
        num_quantiles: K of the standings; None is the run's, or 5. Rounds have the run's in any case.

    Raises:
        IndexError: the pool has no such sample, or retention removed it.
        RunDirectoryError: the run's identity or configuration cannot be read.
        FileNotFoundError: there is no pool.
        PoolCorruptedError: what has to be read is damaged.
    """
    run = _run_around(path)
    with NativePool.open(path if run is None else run.directory.pool) as pool:
        if not 0 <= sample_id < len(pool):
            raise IndexError(
                f"the pool has no sample {sample_id}; it holds {len(pool)} samples, numbered from 0"
            )
        (sample,) = pool.samples([sample_id])
        run_id = pool.info().metadata.get("run_id") if run is None else run.id
        cut = PoolSection() if run is None else run.config.pool
        if num_quantiles is not None:
            cut = cut.model_copy(update={"num_quantiles": num_quantiles})
        return Explanation(
            sample=sample,
            key=_key_of(pool, sample, run_id) if isinstance(run_id, str) else None,
            snapshot=pool.snapshot,
            num_quantiles=cut.num_quantiles,
            standings=tuple(_standing(pool, sample_id, cut, name) for name in pool.score_columns),
            run=None if run is None else run.directory.path,
            rounds=() if run is None else _rounds(pool, sample_id, run),
        )


def _run_around(path: Path) -> _Run | None:
    directory = RunDirectory(path)
    if not directory.is_run():
        directory = RunDirectory(path.resolve().parent)
        if not directory.is_run() or directory.pool.resolve() != path.resolve():
            return None
    try:
        run_id = str(json.loads(directory.identity.read_bytes())["run_id"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
        raise RunDirectoryError(f"{directory.identity} is damaged: {err}") from err
    try:
        config = load_config(directory.config).config
    except (OSError, ConfigError) as err:
        raise RunDirectoryError(f"{directory.config} cannot be read: {err}") from err
    return _Run(directory=directory, id=run_id, config=config)


def _key_of(pool: SamplePool, sample: Sample, run_id: str) -> str | None:
    key = chunk_key(run_id, sample.round, sample.chunk)
    ids = pool.find(key)
    return key if ids is not None and sample.id in ids else None


def _standing(pool: SamplePool, sample_id: int, cut: PoolSection, column: str) -> Standing:
    scores = pool.scores(column)
    score = scores[sample_id]
    return Standing(
        column=column,
        score=float(score),
        rank=None if np.isnan(score) else 1 + int((scores > score).sum()),
        num_tied=int((scores == score).sum()),
        num_scored=int((~np.isnan(scores)).sum()),
        quantile=_quantile_of(sample_id, quantize(pool, cut, score=column)),
    )


def _rounds(pool: SamplePool, sample_id: int, run: _Run) -> tuple[RoundUse, ...]:
    num_steps = num_steps_logged(run.directory.metrics)
    uses = []
    for round in itertools.count():
        num_samples = samples_at(pool, run.id, run.config.run, round)
        if num_samples is None:
            break
        if sample_id >= num_samples:
            continue
        with first_snapshot_with(run.directory.pool, num_samples) as then:
            # The snapshot of that round is no longer there, or cannot be told from a later one.
            is_oldest = then.snapshot.generation == then.oldest_generation
            if len(then) != num_samples or (is_oldest and then.num_removed):
                continue
            quantization = quantize(then, run.config.pool)
            steps = _steps_with(sample_id, quantization, run.config, round)
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


def _steps_with(
    sample_id: int, quantization: Quantization, config: RunConfig, round: int
) -> list[int]:
    try:
        sampler = round_sampler(quantization, config, round)
    except (ValueError, ConfigError):  # nothing, or too little, to draw from: the run stopped here
        return []
    steps = range(config.run.steps_per_round)
    first = round * config.run.steps_per_round
    return [first + step for step in steps if sample_id in sampler.draw(step)[0]]


def _quantile_of(sample_id: int, quantization: Quantization) -> int:
    return int(quantization.labels_of(np.array([sample_id], np.uint64))[0])
