"""The measurements of `quark frontier` that a run stores, and the picked strength."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Self

from quark.errors import RunDirectoryError
from quark.evaluation.frontier import Interval, Point
from quark.formats import VERSION_KEY, check_version, number_in, optional, whole_in
from quark.publication import publish_file
from quark.refusals import way_on
from quark.run_directory import RunDirectory
from quark.safe_files import read_bytes
from quark.types import Json

_FORMAT = 1
_LARGEST = 1e30
"""Larger figures are implausible and do not fit into a chart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierFile:
    """The contents of a run's ``frontier.json``."""

    reward: str
    num_prompts: int
    points: tuple[Point, ...]
    picked: float | None
    """The guidance that `quark generate` uses if the command sets none; None leaves the run's."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN is null."""
        said = {
            VERSION_KEY: _FORMAT,
            "reward": self.reward,
            "num_prompts": self.num_prompts,
            "points": [dataclasses.asdict(point) for point in self.points],
            "picked": self.picked,
        }
        return {key: _without_nan(value) for key, value in said.items()}

    def write(self, run: RunDirectory) -> None:
        """Replace the run's file atomically.

        Raises:
            RunDirectoryError: the disk refused.
        """
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        try:
            publish_file(run.frontier, text)
        except OSError as err:
            raise RunDirectoryError(f"cannot write {run.frontier}: {err}; {way_on(err)}") from err

    @classmethod
    def read(cls, run: RunDirectory) -> Self | None:
        """The run's stored frontier; None if none was measured.

        Raises:
            RunDirectoryError: the file is damaged, or a newer quark wrote it.
            UnsafeFileError: it is a link out of the run, or not a plain file.
        """
        try:
            said = json.loads(read_bytes(run.frontier, run.path))
            if not isinstance(said, dict):
                raise ValueError("it is not a JSON object")
            check_version(said, run.frontier, newest=_FORMAT, error=RunDirectoryError)
            return cls(
                reward=str(said["reward"]),
                num_prompts=whole_in(said["num_prompts"]),
                points=tuple(map(_point, said["points"])),
                picked=optional(_strength, said["picked"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
            raise RunDirectoryError(
                f"{run.frontier} is damaged ({err}): measure it again with `quark frontier {run.path}`"
            ) from err


def _point(said: dict[str, Any]) -> Point:
    values = dict(said)
    for name in ("reward", "drift"):
        values[name] = _interval(said[name])
    values["judges"] = {str(name): _interval(value) for name, value in said["judges"].items()}
    for name in ("guidance", "drift_per_token", "distinct_2", "length", "perplexity"):
        values[name] = _number(said[name])
    if said["quantile"] is not None:
        values["quantile"] = whole_in(said["quantile"])
    return Point(**values)


def _interval(said: dict[str, Any]) -> Interval:
    return Interval(**{name: _number(said[name]) for name in ("mean", "low", "high")})


def _number(said: float | None) -> float:
    if said is None:
        return math.nan
    if isinstance(said, bool) or not isinstance(said, int | float) or abs(said) > _LARGEST:
        raise ValueError(f"{said!r} is no figure of a frontier")
    return float(said)


def _strength(said: Json) -> float:
    value = number_in(said)
    if not 0.0 <= value <= _LARGEST:
        raise ValueError(f"{value} is no strength of guidance")
    return value


def _without_nan(value: Any) -> Any:  # noqa: ANN401 - any plain value
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
