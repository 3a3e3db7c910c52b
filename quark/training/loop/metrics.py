"""The metric log: one JSON object a line, described in docs/metrics.md, NaN written as null."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quark.publication import AppendedFile
from quark.safe_files import lines
from quark.training.loop.trackers import Tracker


class MetricLog:
    """Appends rows to ``metrics.jsonl`` and hands numbers on to trackers.

    Args:
        path: made where missing.
        offset: cut the file to this many bytes first: the length it had at the checkpoint that a run
            resumes from, so that no row is there twice.
        trackers: get the numeric fields of every row.
    """

    def __init__(self, path: Path, *, offset: int, trackers: Sequence[Tracker] = ()) -> None:
        self._file = AppendedFile(path, keep=offset)
        self._trackers = trackers

    def write(self, event: str, step: int, **fields: object) -> None:
        """Append one row; it is handed to the operating system before this returns.

        Raises:
            OSError: the disk refused, and nothing of the row is in the file.
        """
        row = _plain({"event": event, "step": step, "unix_time": round(time.time(), 3), **fields})
        self._file.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        numbers = {
            f"{event}/{key}": float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and key not in ("step", "unix_time")
        }
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def sync(self) -> int:
        """Make the rows durable and return the file's length in bytes."""
        return self._file.sync()

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class SilentLog:
    """The log of a process that writes none."""

    def write(self, event: str, step: int, **fields: object) -> None:
        """Ignore the row."""
        pass

    def sync(self) -> int:
        """Return 0, the length of a log without rows."""
        return 0

    def close(self) -> None:
        """Do nothing: no file is open."""
        pass


def num_steps_logged(path: Path) -> int:
    """Optimizer steps that a run has taken, by its log; 0 without one.

    A line that a crash cut short says nothing.
    """
    taken = 0
    with contextlib.suppress(FileNotFoundError):
        for line in lines(path, path.parent):
            with contextlib.suppress(ValueError, RecursionError):
                match json.loads(line):
                    case {"event": "step", "step": int(step)}:
                        taken = step + 1
    return taken


def steps_left_out(path: Path) -> dict[int, int]:
    """By round, the steps that its brake left out, by the run's log; only rounds with some."""
    left_out: dict[int, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in lines(path, path.parent):
            with contextlib.suppress(ValueError, RecursionError):
                match json.loads(line):
                    case {"event": "held_out", "round": int(round), "steps_braked": int(steps)} if (
                        steps
                    ):
                        left_out[round] = steps
    return left_out


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON-like value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | None):
        return value
    if isinstance(value, int):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    number = float(value)
    return number if math.isfinite(number) else None
