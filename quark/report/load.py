"""What a run directory says about its run.

Reads ``run.json``, ``config.toml``, ``metrics.jsonl`` and the pool, all read-only, and expects any of them
but the first to be missing or cut off: a run may be going on or may have crashed.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quark.config.load import parse_toml
from quark.errors import PoolError, RunDirectoryError, UnsafeFileError
from quark.evaluation.frontier_file import FrontierFile
from quark.pool.base import Sample, SamplePool
from quark.pool.columns import REWARD_COLUMN
from quark.pool.ranking import RankingRules
from quark.pool.recorded_ranking import recorded_rules
from quark.pool.writer_lock import has_writer
from quark.run_directory import RunDirectory
from quark.run_identity import RunIdentity
from quark.safe_files import lines, read_text

SAMPLES_PER_KIND = 2
_LARGEST = 1e100
"""Far beyond what is measured, and far from where floats and charts end."""

Row = Mapping[str, Any]
"""One line of ``metrics.jsonl``; null stands for NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantileView:
    """One quantile of the pool with samples to look at."""

    index: int
    """0 holds the lowest rewards."""
    num_samples: int
    lower_bound: float
    """Lowest reward in it; NaN where it is empty."""
    mean: float
    samples: tuple[tuple[str, Sample], ...]
    """(``best`` | ``typical`` | ``worst``, sample), best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """The pool at the moment of reading."""

    rewards: NDArray[np.float32]
    """[N] in id order, NaN = not scored."""
    labels: NDArray[np.int16]
    """[N] quantile of each sample, -1 for those that are not ranked."""
    quantiles: tuple[QuantileView, ...]

    @property
    def num_unscored(self) -> int:
        """Number of samples whose reward is NaN."""
        return int(np.isnan(self.rewards).sum())

    @property
    def num_outside(self) -> int:
        """Samples that have a score and are not ranked by the run."""
        return int((self.labels < 0).sum()) - self.num_unscored


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """Everything the page shows, by event and in order; a repeated row (after a resume) counts once."""

    directory: RunDirectory
    identity: RunIdentity
    config: Row
    rules: RankingRules
    """How the configuration cuts the pool."""
    runs: tuple[Row, ...]
    steps: tuple[Row, ...]
    rounds: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    control_curves: tuple[Row, ...]
    alerts: tuple[Row, ...]
    end: Row | None
    """The result, of a run that came to its end."""
    stop: Row | None
    """How the run was left where it did not, and nothing was logged since."""
    last_written: float
    """Unix time of the last row of the log; NaN without one."""
    is_written: bool | None
    """Whether a process holds the pool's writer lock; None where that cannot be known."""
    frontier: FrontierFile | None
    """Reward against drift, where it was measured and can be read."""
    num_bad_lines: int
    """Lines of ``metrics.jsonl`` that are not complete JSON objects."""
    pool: PoolView | None
    pool_problem: str | None
    """Why ``pool`` is None."""

    @property
    def num_quantiles(self) -> int:
        """K, from what was logged; the configuration's where nothing was."""
        for row, key in ((self.last_round, "quantile_counts"), (self.last_curve, "reward_mean")):
            if row is not None and isinstance(values := row.get(key), list) and values:
                return len(values)
        return self.rules.num_quantiles

    @property
    def last_round(self) -> Row | None:
        """The newest logged row of a round; None before the first."""
        return self.rounds[-1] if self.rounds else None

    @property
    def last_curve(self) -> Row | None:
        """The newest logged control curve; None before the first."""
        return self.control_curves[-1] if self.control_curves else None

    @property
    def baseline(self) -> Row | None:
        """The first evaluation of the original model, without a reward token."""
        return next((row for row in self.evaluations if row.get("quantile") is None), None)

    @property
    def best_evaluations(self) -> tuple[Row, ...]:
        """Evaluations under the best reward token, by step."""
        best = max(
            (q for row in self.evaluations if isinstance(q := row.get("quantile"), int)),
            default=None,
        )
        return tuple(
            row for row in self.evaluations if best is not None and row.get("quantile") == best
        )


def load_run(path: Path) -> RunData:
    """Read a run directory.

    Raises:
        RunDirectoryError: ``path`` is not a run directory, or its ``run.json`` or ``config.toml`` is damaged.
        UnsafeFileError: a file of it is a link out of it, or not a plain file.
    """
    directory = RunDirectory(path)
    if not directory.is_run():
        raise RunDirectoryError(
            f"{path} is not a run directory (it has no {directory.identity.name}): give the --run-dir of a run"
        )
    rows, num_bad_lines = read_metrics(directory.metrics)
    identity = RunIdentity.read(directory)
    config = read_config(directory.config)
    by_event: dict[str, list[Row]] = {}
    for row in rows:
        by_event.setdefault(str(row.get("event")), []).append(row)
    rounds = _last_of_each(by_event.get("round", []), "round")
    curves = _last_of_each(by_event.get("control_curve", []), "step")
    data = RunData(
        directory=directory,
        identity=identity,
        config=config,
        rules=recorded_rules(config, directory.standards),
        runs=tuple(by_event.get("run", ())),
        steps=_last_of_each(by_event.get("step", []), "step"),
        rounds=rounds,
        evaluations=_last_of_each(by_event.get("evaluation", []), "step", "quantile"),
        control_curves=curves,
        alerts=_last_of_each(
            [row for row in by_event.get("alert", []) if {"round", "text"} <= row.keys()],
            "step",
            "text",
        ),
        end=by_event["end"][-1] if "end" in by_event else None,
        stop=rows[-1] if rows and rows[-1].get("event") == "stop" else None,
        last_written=figure(rows[-1] if rows else None, "unix_time"),
        is_written=has_writer(directory.pool),
        frontier=_frontier(directory),
        num_bad_lines=num_bad_lines,
        pool=None,
        pool_problem=None,
    )
    return _with_pool(data)


def _frontier(directory: RunDirectory) -> FrontierFile | None:
    with contextlib.suppress(RunDirectoryError, UnsafeFileError):
        return FrontierFile.read(directory)
    return None


def figure(row: Row | None, key: str) -> float:
    """A number of a row; NaN where the row, the key or the number is missing."""
    return number_in(None if row is None else row.get(key))


def number_in(value: object) -> float:
    """What a row says as a number; NaN where it says none, or one that no chart has room for."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _LARGEST:
        return math.nan
    return float(value)


def summarize_pool(pool: SamplePool, rules: RankingRules) -> PoolView:
    """Rewards, labels and a few samples of every quantile, ranked by these rules.

    Raises:
        KeyError: there is no such score column.
        ValueError, TypeError: as ``RankingRules.quantize``.
    """
    rewards = pool.scores(rules.score)
    quantization = rules.quantize(pool)
    labels = quantization.labels()
    views = []
    for index in range(rules.num_quantiles):
        ids = np.flatnonzero(labels == index)
        ranked = ids[np.argsort(-rewards[ids], kind="stable")]
        views.append(
            QuantileView(
                index=index,
                num_samples=len(ranked),
                lower_bound=float(quantization.lower_bounds[index]),
                mean=float(rewards[ranked].mean(dtype=np.float64)) if len(ranked) else math.nan,
                samples=_picked(pool, ranked),
            )
        )
    removed = pool.num_removed
    return PoolView(rewards=rewards[removed:], labels=labels[removed:], quantiles=tuple(views))


def _picked(pool: SamplePool, ranked: NDArray[np.int64]) -> tuple[tuple[str, Sample], ...]:
    kinds: dict[int, str] = {}
    middle = max(len(ranked) // 2 - SAMPLES_PER_KIND // 2, 0)
    for kind, chosen in (
        ("best", ranked[:SAMPLES_PER_KIND]),
        ("worst", ranked[-SAMPLES_PER_KIND:]),
        ("typical", ranked[middle : middle + SAMPLES_PER_KIND]),
    ):
        for sample_id in chosen:
            kinds.setdefault(int(sample_id), kind)
    order = {"best": 0, "typical": 1, "worst": 2}
    chosen_ids = [int(i) for i in ranked if int(i) in kinds]
    chosen_ids.sort(key=lambda i: order[kinds[i]])
    samples = pool.samples(chosen_ids)
    return tuple((kinds[sample.id], sample) for sample in samples)


def _with_pool(data: RunData) -> RunData:
    from quark.pool.native import NativePool

    if not data.directory.pool.exists():
        return replace(data, pool_problem="there is no pool yet")
    try:
        pool = NativePool.open(data.directory.own(data.directory.pool))
    except (PoolError, OSError, UnsafeFileError) as error:
        return replace(data, pool_problem=str(error))
    try:
        if len(pool) == 0:
            return replace(data, pool_problem="the pool is still empty")
        rules = replace(data.rules, num_quantiles=data.num_quantiles)
        return replace(data, pool=summarize_pool(pool, rules))
    except KeyError:
        return replace(data, pool_problem=f"the pool has no score column {REWARD_COLUMN!r}")
    except (PoolError, OSError) as error:
        return replace(data, pool_problem=str(error))
    except (ValueError, TypeError) as error:
        return replace(data, pool_problem=f"config.toml does not say how it is ranked: {error}")
    finally:
        pool.close()


def read_config(path: Path) -> Row:
    """The effective configuration of a run as it stands in its file; empty without one. Raises RunDirectoryError."""
    try:
        return parse_toml(read_text(path, path.parent))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as err:
        raise RunDirectoryError(f"{path} cannot be read: {err}") from err


def read_metrics(path: Path) -> tuple[list[Row], int]:
    """The rows of a run's metric log, and how many lines of it are damaged; none without a log."""
    rows: list[Row] = []
    bad = 0
    with contextlib.suppress(FileNotFoundError):
        for line in lines(path, path.parent):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                bad += 1
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                bad += 1
    return rows, bad


def _last_of_each(rows: list[Row], *keys: str) -> tuple[Row, ...]:
    latest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        latest[tuple(json.dumps(row.get(key)) for key in keys)] = row
    return tuple(sorted(latest.values(), key=lambda row: figure(row, keys[0])))
