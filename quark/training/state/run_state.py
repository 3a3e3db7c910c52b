"""What a checkpoint says besides its tensors: ``state.json``, read and written here alone.

Fields that older files lack have defaults. What a newer quark wrote is refused, and so is a field that is not known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from quark.errors import CheckpointError, UnsafeFileError
from quark.formats import VERSION_KEY, check_version
from quark.run_directory import RunDirectory
from quark.safe_files import read_bytes
from quark.training.position import Answer, Baseline, Position
from quark.types import Json

FORMAT_VERSION = 1
FILE_NAME = "state.json"


class NewerStateError(CheckpointError):
    """A checkpoint of a newer quark: nothing is wrong with it, so it is neither skipped nor removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """The loss's coefficients, as far as their controllers have moved them."""

    kl_coef: float
    entropy_coef: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertsState:
    """What the next check for alerts depends on."""

    active: frozenset[str] = frozenset()
    """Kinds that have begun and not ended."""
    largest_gap: float = 0.0
    """Highest clear control gap so far; 0 before there was one."""
    num_gaps: int = 0
    """Control gaps measured."""
    largest_information: float = 0.0
    """Most that the tokens have told, in nats; 0 before they told anything."""
    rounds_without_information: int = 0
    """Rounds in a row, up to now, in which they told nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """The snapshot of the pool that a checkpoint goes on from."""

    generation: int
    hash: str
    samples: int
    learns_from: int | None = None
    """Generation that a round under way learns from; the pool can be ahead of it. None between rounds."""

    @property
    def oldest_needed(self) -> int:
        """The oldest generation that the run still reads."""
        return min(self.generation, self.learns_from or self.generation)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Everything in a checkpoint that is not a tensor."""

    step: int
    """Optimizer steps so far; names the checkpoint."""
    score: float | None
    """Mean held-out reward of these weights; None where it was not measured or is not finite."""
    run_id: str
    position: Position
    objective: Coefficients
    alerts: AlertsState | None
    """None in a checkpoint of before there were alerts."""
    pool: PoolState
    metrics_bytes: int
    """Length of the metric log."""
    fingerprint: Mapping[str, str]
    """By name, what has to be equal for a resumed run to be the same run."""

    def to_text(self) -> str:
        """The content of ``state.json``."""
        score = self.score if self.score is not None and math.isfinite(self.score) else None
        said: dict[str, Json] = {
            VERSION_KEY: FORMAT_VERSION,
            "step": self.step,
            "score": score,
            "run_id": self.run_id,
            "position": _position_to_json(self.position),
            "objective": {
                "kl_coef": self.objective.kl_coef,
                "entropy_coef": self.objective.entropy_coef,
            },
        }
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
        """What ``to_text`` gave, now or in an older quark.

        Args:
            text: the content of ``path``.
            path: named by errors.

        Raises:
            NewerStateError: a newer quark wrote it.
            CheckpointError: it is damaged.
        """
        with _told_as_damage(path):
            said = _versioned(text, path)
            alerts = said.get("alerts")
            return cls(
                step=_whole(said["step"]),
                score=_number_or_none(said.get("score")),
                run_id=_text(said["run_id"]),
                position=_position(_object(said["position"])),
                objective=Coefficients(
                    kl_coef=_number(_object(said["objective"])["kl_coef"]),
                    entropy_coef=_number(_object(said["objective"])["entropy_coef"]),
                ),
                alerts=None if alerts is None else _alerts(_object(alerts)),
                pool=_pool(_object(said["pool"])),
                metrics_bytes=_whole(said["metrics_bytes"]),
                fingerprint={k: _text(v) for k, v in _object(said["fingerprint"]).items()},
            )


def score_of(folder: Path) -> float | None:
    """The score of the checkpoint in ``folder``; None where it has none or cannot be read."""
    try:
        return _number_or_none(json.loads(read_bytes(folder / FILE_NAME, folder))["score"])
    except (OSError, UnsafeFileError, ValueError, KeyError, TypeError, RecursionError):
        return None


def oldest_snapshot_needed(run: RunDirectory) -> int | None:
    """The oldest pool snapshot from which a checkpoint goes on; None without checkpoints.

    Raises:
        UnsafeFileError: a link leads from the checkpoints out of the run directory.
        NewerStateError: a newer quark wrote a checkpoint.
    """
    generations = []
    for path in run.own(run.checkpoints).glob(f"step-*/{FILE_NAME}"):
        try:
            with _told_as_damage(path):
                said = _versioned(read_bytes(path, run.path), path)
                # A hash and a length are not asked for: what is needed is known without.
                pool = _object(said["pool"])
                learns_from = pool.get("learns_from")
                generations.append(_whole(pool["generation"]))
                generations += [] if learns_from is None else [_whole(learns_from)]
        except NewerStateError:
            raise
        except CheckpointError:  # one that cannot be read cannot be resumed from either
            continue
    return min(generations, default=None)


def _versioned(text: bytes | str, path: Path) -> dict[str, Json]:
    said = _object(json.loads(text))
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
    said: dict[str, Any] = {field.name: getattr(position, field.name) for field in fields(Position)}
    baseline = position.baseline
    said["baseline"] = {}
    if baseline is not None:
        said["baseline"] = {
            "metrics": dict(baseline.metrics),
            "judges": dict(baseline.judges),
            "answers": [[a.prompt, a.completion, a.reward] for a in baseline.answers],
        }
    return said


def _position(said: dict[str, Json]) -> Position:
    readers = {
        "micro_batch_size": _whole_or_none,
        "totals": _numbers,
        "seconds": _number,
        "fresh": _numbers,
        "previous_bounds": _list_of_numbers_or_none,
        "held_out_best": _number_or_none,
        "are_tokens_settled": _truth,
        "baseline": _baseline,
    }
    known = {field.name for field in fields(Position)}
    if unknown := said.keys() - known:
        raise ValueError(f"{min(unknown)!r} in its position is not known here")
    values: dict[str, Any] = {
        name: readers.get(name, _whole)(value) for name, value in said.items()
    }
    return Position(**values)


def _baseline(value: Json) -> Baseline | None:
    said = _object(value)
    if not said:
        return None
    return Baseline(
        metrics=_numbers(said["metrics"]),
        judges=_numbers(said.get("judges", {})),
        answers=tuple(_answer(answer) for answer in _list(said.get("answers", []))),
    )


def _answer(value: Json) -> Answer:
    prompt, completion, reward = _list(value)
    return Answer(
        prompt=_text(prompt), completion=_text(completion), reward=_number_or_none(reward)
    )


def _alerts(said: dict[str, Json]) -> AlertsState:
    return AlertsState(
        active=frozenset(_text(kind) for kind in _list(said["active"])),
        largest_gap=_number(said["largest_gap"]),
        num_gaps=_whole(said["num_gaps"]),
        largest_information=_number(said.get("largest_information", 0.0)),
        rounds_without_information=_whole(said.get("rounds_without_information", 0)),
    )


def _pool(said: dict[str, Json]) -> PoolState:
    return PoolState(
        generation=_whole(said["generation"]),
        hash=_text(said["hash"]),
        samples=_whole(said["samples"]),
        learns_from=_whole_or_none(said.get("learns_from")),
    )


def _object(value: Json) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise ValueError(f"{_shown(value)} stands where an object is needed")
    return value


def _list(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise ValueError(f"{_shown(value)} stands where a list is needed")
    return value


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)} stands where a text is needed")
    return value


def _truth(value: Json) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{_shown(value)} stands where true or false is needed")
    return value


def _whole(value: Json) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{_shown(value)} stands where a whole number is needed")
    return value


def _whole_or_none(value: Json) -> int | None:
    return None if value is None else _whole(value)


def _number(value: Json) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{_shown(value)} stands where a number is needed")
    return float(value)


def _number_or_none(value: Json) -> float | None:
    return None if value is None else _number(value)


def _numbers(value: Json) -> dict[str, float]:
    return {name: _number(number) for name, number in _object(value).items()}


def _list_of_numbers_or_none(value: Json) -> list[float] | None:
    return None if value is None else [_number(number) for number in _list(value)]


def _shown(value: Json) -> str:
    return repr(value)[:40]
