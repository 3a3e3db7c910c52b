"""The state in a checkpoint besides its tensors: ``state.json``, read and written only here.

Fields that older files lack have defaults. Files of a newer quark and unknown fields are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from quark.errors import CheckpointError, UnsafeFileError
from quark.formats import (
    VERSION_KEY,
    by_name,
    check_version,
    list_in,
    number_in,
    object_in,
    optional,
    text_in,
    truth_in,
    whole_in,
)
from quark.refusals import says_nothing_of_the_bytes, way_on
from quark.run_directory import RunDirectory
from quark.safe_files import read_bytes
from quark.training.position import Answer, Baseline, Position
from quark.types import Json

FORMAT_VERSION = 1
FILE_NAME = "state.json"


class NewerStateError(CheckpointError):
    """A checkpoint of a newer quark. It is not damaged, so it is neither skipped nor removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertsState:
    """The state of the alerts."""

    active: frozenset[str] = frozenset()
    """Kinds of alerts that have begun and not ended."""
    largest_gap: float = 0.0
    """Highest significant control gap so far; 0 before the first one."""
    num_gaps: int = 0
    """Number of measured control gaps."""
    largest_information: float = 0.0
    """Highest information of the tokens so far, in nats; 0 before there was any."""
    rounds_without_information: int = 0
    """Current number of consecutive rounds without information."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """The pool snapshot of a checkpoint."""

    generation: int
    hash: str
    samples: int
    learns_from: int | None = None
    """Generation that the current round learns from; the pool can be ahead of it. None between rounds."""

    @property
    def oldest_needed(self) -> int:
        """The oldest generation that the run still needs."""
        return min(self.generation, self.learns_from or self.generation)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """All of a checkpoint except its tensors."""

    step: int
    """Number of optimizer steps so far. It names the checkpoint."""
    score: float | None
    """Mean held-out reward of these weights; None if it was not measured or is not finite."""
    run_id: str
    position: Position
    objective: Mapping[str, float]
    """State of the objective, which it reads itself."""
    alerts: AlertsState | None
    """None in a checkpoint from before there were alerts."""
    pool: PoolState
    metrics_bytes: int
    """Length of the metric log."""
    fingerprint: Mapping[str, str]
    """Facts that must be equal when the run is resumed, by name."""
    hooks: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    """State of the weight hooks by name. Each reads its own."""

    def to_text(self) -> str:
        """The content of ``state.json``."""
        score = self.score if self.score is not None and math.isfinite(self.score) else None
        said: dict[str, Json] = {
            VERSION_KEY: FORMAT_VERSION,
            "step": self.step,
            "score": score,
            "run_id": self.run_id,
            "position": _position_to_json(self.position),
            "objective": dict(self.objective),
        }
        if self.hooks:
            said["hooks"] = {name: dict(state) for name, state in self.hooks.items()}
        if self.alerts is not None:
            said["alerts"] = {
                "active": [*sorted(self.alerts.active)],
                "largest_gap": self.alerts.largest_gap,
                "num_gaps": self.alerts.num_gaps,
                "largest_information": self.alerts.largest_information,
                "rounds_without_information": self.alerts.rounds_without_information,
            }
        said["pool"] = {
            "generation": self.pool.generation,
            "hash": self.pool.hash,
            "samples": self.pool.samples,
            "learns_from": self.pool.learns_from,
        }
        said["metrics_bytes"] = self.metrics_bytes
        said["fingerprint"] = dict(self.fingerprint)
        return json.dumps(said, indent=1) + "\n"

    @classmethod
    def of_text(cls, text: bytes | str, path: Path) -> Self:
        """Parse the result of ``to_text``, from this or an older quark.

        Args:
            text: the content of ``path``.
            path: the file to name in errors.

        Raises:
            NewerStateError: a newer quark wrote it.
            CheckpointError: it is damaged.
        """
        with _told_as_damage(path):
            said = _versioned(text, path)
            alerts = said.get("alerts")
            return cls(
                step=whole_in(said["step"]),
                score=optional(number_in, said.get("score")),
                run_id=text_in(said["run_id"]),
                position=_position(object_in(said["position"]), path),
                objective=by_name(number_in, said["objective"]),
                hooks=by_name(object_in, said.get("hooks", {})),
                alerts=None if alerts is None else _alerts(object_in(alerts)),
                pool=_pool(object_in(said["pool"])),
                metrics_bytes=whole_in(said["metrics_bytes"]),
                fingerprint=by_name(text_in, said["fingerprint"]),
            )


def score_of(folder: Path) -> float | None:
    """The score of the checkpoint in ``folder``; None if it has none or cannot be read."""
    try:
        return optional(number_in, json.loads(read_bytes(folder / FILE_NAME, folder))["score"])
    except (OSError, UnsafeFileError, ValueError, KeyError, TypeError, RecursionError):
        return None


def oldest_snapshot_needed(run: RunDirectory) -> int | None:
    """The oldest pool snapshot that a checkpoint needs; None without checkpoints.

    Raises:
        UnsafeFileError: a link leads from the checkpoints out of the run directory.
        NewerStateError: a newer quark wrote a checkpoint.
        CheckpointError: a checkpoint cannot be opened now, which says nothing of what it needs.
    """
    generations = []
    for path in run.own(run.checkpoints).glob(f"step-*/{FILE_NAME}"):
        try:
            with _told_as_damage(path):
                said = _versioned(read_bytes(path, run.path), path)
                # Hash and length are not checked, because only the generation is needed.
                pool = object_in(said["pool"])
                learns_from = pool.get("learns_from")
                generations.append(whole_in(pool["generation"]))
                generations += [] if learns_from is None else [whole_in(learns_from)]
        except NewerStateError:
            raise
        except CheckpointError as err:
            cause = err.__cause__
            if isinstance(cause, OSError) and says_nothing_of_the_bytes(cause):
                raise CheckpointError(f"{path} cannot be read: {cause}; {way_on(cause)}") from cause
            # A damaged checkpoint cannot be resumed from either.
    return min(generations, default=None)


def _versioned(text: bytes | str, path: Path) -> dict[str, Json]:
    said = object_in(json.loads(text))
    check_version(said, path, newest=FORMAT_VERSION, error=NewerStateError)
    return said


@contextmanager
def _told_as_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as err:
        reason = f"{err} is missing" if isinstance(err, KeyError) else str(err)
        raise CheckpointError(f"{path} is not the state of a checkpoint: {reason}") from err


def _position_to_json(position: Position) -> dict[str, Json]:
    said: dict[str, Any] = {f.name: getattr(position, f.name) for f in fields(Position)}
    baseline = position.baseline
    said["baseline"] = {}
    if baseline is not None:
        said["baseline"] = {
            "metrics": dict(baseline.metrics),
            "judges": dict(baseline.judges),
            "answers": [[a.prompt, a.completion, a.reward] for a in baseline.answers],
        }
    return said


def _position(said: dict[str, Json], path: Path) -> Position:
    readers: dict[str, Callable[[Json], Any]] = {
        "micro_batch_size": lambda value: optional(_size, value),
        "totals": lambda value: by_name(number_in, value),
        "seconds": number_in,
        "fresh": lambda value: by_name(number_in, value),
        "previous_bounds": lambda value: optional(
            lambda bounds: [number_in(bound) for bound in list_in(bounds)], value
        ),
        "held_out_best": lambda value: optional(number_in, value),
        "are_tokens_settled": truth_in,
        "baseline": _baseline,
    }
    known = {f.name for f in fields(Position)}
    if unknown := said.keys() - known:
        raise NewerStateError(
            f"{path} has {min(unknown)!r}, which this quark does not know: use a newer one"
        )
    values: dict[str, Any] = {
        name: readers.get(name, whole_in)(value) for name, value in said.items()
    }
    return Position(**values)


def _size(value: Json) -> int:
    if value == 0:
        raise ValueError("0 stands where a size is needed")
    return whole_in(value)


def _baseline(value: Json) -> Baseline | None:
    said = object_in(value)
    if not said:
        return None
    return Baseline(
        metrics=by_name(number_in, said["metrics"]),
        judges=by_name(number_in, said.get("judges", {})),
        answers=tuple(_answer(answer) for answer in list_in(said.get("answers", []))),
    )


def _answer(value: Json) -> Answer:
    prompt, completion, reward = list_in(value)
    return Answer(
        prompt=text_in(prompt), completion=text_in(completion), reward=optional(number_in, reward)
    )


def _alerts(said: dict[str, Json]) -> AlertsState:
    return AlertsState(
        active=frozenset(text_in(kind) for kind in list_in(said["active"])),
        largest_gap=number_in(said["largest_gap"]),
        num_gaps=whole_in(said["num_gaps"]),
        largest_information=number_in(said.get("largest_information", 0.0)),
        rounds_without_information=whole_in(said.get("rounds_without_information", 0)),
    )


def _pool(said: dict[str, Json]) -> PoolState:
    return PoolState(
        generation=whole_in(said["generation"]),
        hash=text_in(said["hash"]),
        samples=whole_in(said["samples"]),
        learns_from=optional(whole_in, said.get("learns_from")),
    )
