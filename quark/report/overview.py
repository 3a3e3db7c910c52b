"""One line about each run in a folder, from its small files alone: pools and models are not opened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quark.errors import QuarkError
from quark.pool.writer_lock import has_writer
from quark.report.load import Row, figure, read_config, read_metrics
from quark.run_directory import RunDirectory
from quark.run_identity import RunIdentity

MAX_DEPTH = 3
"""Folders below the given one that are searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOverview:
    """What is known of a run at a glance."""

    path: Path
    state: str
    """``running``, ``finished``, ``stopped`` (it can be resumed), ``new`` or ``damaged``."""
    model: str
    reward: str
    rounds: int
    """Rounds that are finished."""
    num_rounds: int
    samples: int
    reward_before: float
    """Mean on held-out prompts, of the original model; NaN where it was not measured."""
    reward_now: float
    """The newest measurement under the best token; NaN likewise."""
    drift: float
    """KL(sampled || original) of it in nats per token; NaN likewise."""
    last_written: float
    """Unix time of the newest row of the log; NaN without one."""
    problem: str | None = None
    """Why the run is ``damaged``."""


def runs_in(folder: Path) -> list[RunOverview]:
    """The runs in a folder and below it, or the one that it is, by path. Links are not followed.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no directory {folder}")
    return [overview_of(path) for path in _run_paths(folder, MAX_DEPTH)]


def overview_of(path: Path) -> RunOverview:
    """What is known of one run; a damaged one is told, not raised."""
    run = RunDirectory(path)
    try:
        RunIdentity.read(run)
        config = read_config(run.config)
        rows, _ = read_metrics(run.metrics)
    except (QuarkError, OSError) as err:
        return _overview(path, {}, [], state="damaged", problem=str(err))
    return _overview(path, config, rows, state=_state(run, rows), problem=None)


def _run_paths(folder: Path, depth: int) -> Iterator[Path]:
    if RunDirectory(folder).is_run():
        yield folder
    elif depth:
        try:
            below = sorted(path for path in folder.iterdir() if path.is_dir())
        except OSError:
            return
        for path in below:
            if not path.is_symlink():
                yield from _run_paths(path, depth - 1)


def _state(run: RunDirectory, rows: list[Row]) -> str:
    if has_writer(run.pool):
        return "running"
    if rows and rows[-1].get("event") == "end":
        return "finished"
    return "stopped" if rows else "new"


def _overview(
    path: Path, config: Row, rows: list[Row], *, state: str, problem: str | None
) -> RunOverview:
    rounds = [row for row in rows if row.get("event") == "round"]
    measured = [row for row in rows if row.get("event") == "evaluation"]
    quantiles = [row["quantile"] for row in measured if isinstance(row.get("quantile"), int)]
    best = max(quantiles, default=None)
    newest = next((row for row in reversed(measured) if row.get("quantile") == best), None)
    before = next((row for row in measured if row.get("quantile") is None), None)
    numbers = [figure(row, "samples") for row in rounds]
    num_rounds = figure(_section(config, "run"), "num_rounds")
    return RunOverview(
        path=path,
        state=state,
        model=str(_section(config, "model").get("name", "")),
        reward=str(_section(config, "reward").get("name", "")),
        rounds=len({figure(row, "round") for row in rounds}),
        num_rounds=0 if math.isnan(num_rounds) else int(num_rounds),
        samples=int(max((number for number in numbers if not math.isnan(number)), default=0)),
        reward_before=figure(before, "reward_mean"),
        reward_now=math.nan if best is None else figure(newest, "reward_mean"),
        drift=math.nan if best is None else figure(newest, "kl_sampled_to_reference"),
        last_written=figure(rows[-1] if rows else None, "unix_time"),
        problem=problem,
    )


def _section(config: Row, name: str) -> Row:
    section = config.get(name)
    return section if isinstance(section, dict) else {}
