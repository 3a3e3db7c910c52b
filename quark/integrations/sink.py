"""Commits the rollouts of another trainer to a pool, and answers from it what was scored before.

A rollout is known by its step, its prompt, its token ids, the names of its scores and its count among equal ones of
the step. The digest of these is the sample's ``seed``.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import polars as pl

from quark.errors import ConfigError
from quark.formats import plain_json
from quark.pool.base import PromptRecord, Sample, SampleBatch
from quark.pool.columns import REWARD_COLUMN, column_name
from quark.pool.native import NativePool
from quark.types import FinishReason, Json

KEY = "sink/"
"""How the idempotency keys of a sink begin."""
MAX_METADATA_BYTES = 1 << 16
"""Of a prompt; larger values of a data set are left out."""
MAX_NOTES_BYTES = 1 << 19
"""Of one call; larger notes are left out."""

Resume = Literal["replay"]


class Tokenizer(Protocol):
    """The part of a tokenizer that a sink uses."""

    eos_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Turn a text into token ids."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str:
        """Turn token ids into text."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One completion on its way into the pool."""

    prompt_text: str
    prompt_tokens: Sequence[int]
    completion_text: str
    completion_tokens: Sequence[int]
    prompt_metadata: Mapping[str, Json] = field(default_factory=dict)


Scores = Mapping[str, Sequence[float | None]]
"""By name, one score for each rollout; None where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Some rollouts of one step, and what the pool knows of them."""

    rollouts: Sequence[Rollout]
    step: int
    digests: Sequence[int]
    missing: Sequence[int]
    """Positions of those that are not known."""
    scores: dict[str, list[float | None]]
    """By name, for each rollout; None where it is missing or has no score."""
    notes: Sequence[Json]
    """What was kept with each one; None where it is missing."""


class RolloutSink:
    """A pool that takes every rollout before the trainer goes on.

    Args:
        path: The pool; made if it is not there.
        tokenizer: Of the policy; gives the vocabulary of a new pool and tells finished completions.
        names: Of the scores.
        weights: Of the scores in the column ``reward``, by name.
        source: Kept in the settings of every append.
        resume: ``"replay"`` answers from the pool what was scored before; None scores it again.

    Raises:
        ConfigError: Two names are one column of a pool.
        PoolLockedError: Another process writes the pool.
        PoolError: The pool is damaged.
        OSError: It cannot be made or opened.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: Tokenizer,
        names: Sequence[str],
        weights: Mapping[str, float],
        source: Mapping[str, Json],
        resume: Resume | None,
    ) -> None:
        self.path = Path(path)
        self._columns = _columns_of(names)
        self._weights = weights
        self._source = source
        self._eos = tokenizer.eos_token_id
        self._lock = threading.Lock()
        self._step = -1
        self._counts: Counter[bytes] = Counter()
        if self.path.exists():
            self._pool = NativePool.open(self.path, writable=True)
        else:
            self.path.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._pool = NativePool.create(
                self.path,
                vocab_size=max(tokenizer.get_vocab().values()) + 1,
                metadata={"source": dict(source)},
            )
        self._known = self._digests() if resume == "replay" else None

    def scores(
        self,
        rollouts: Sequence[Rollout],
        *,
        step: int,
        score: Callable[[Sequence[int]], Scores],
    ) -> dict[str, list[float | None]]:
        """The scores of all rollouts. On return every one of them survives a power cut with its scores.

        Args:
            rollouts: N of one step.
            step: Of the trainer.
            score: Scores the rollouts at some positions; called at most once, and not for those that are known.

        Raises:
            ValueError: ``score`` gave another number of scores, or a token id is outside of the vocabulary.
            OSError: The disk refused; nothing of this call is in the pool.
        """
        asked = self.ask(rollouts, step=step)
        if asked.missing:
            self.commit(asked, score(asked.missing))
        return asked.scores

    def ask(self, rollouts: Sequence[Rollout], *, step: int) -> Asked:
        """What the pool knows of some rollouts of one step. Calls are counted, so equal rollouts are told apart."""
        with self._lock:
            digests = self._digests_of(rollouts, step)
            found = self._found(digests)
        scores: dict[str, list[float | None]] = {
            name: [
                _plain(found[digest].scores.get(column)) if digest in found else None
                for digest in digests
            ]
            for name, column in self._columns.items()
        }
        return Asked(
            rollouts=rollouts,
            step=step,
            digests=digests,
            missing=[at for at, digest in enumerate(digests) if digest not in found],
            scores=scores,
            notes=[
                json.loads(found[digest].settings).get("notes") if digest in found else None
                for digest in digests
            ],
        )

    def commit(self, asked: Asked, fresh: Scores, *, notes: Json = None) -> None:
        """Append the rollouts of ``asked.missing`` with their scores, and fill in ``asked.scores``.

        Args:
            asked: As ``ask`` gave it.
            fresh: By name, one score for each missing rollout.
            notes: Kept in the settings of the append, if they have at most ``MAX_NOTES_BYTES``.

        Raises:
            ValueError, OSError: As ``scores``.
        """
        checked = {name: [_plain(value) for value in fresh[name]] for name in self._columns}
        for name, values in checked.items():
            if len(values) != len(asked.missing):
                raise ValueError(
                    f"the reward {name} gave {len(values)} scores for {len(asked.missing)} completions"
                )
        with self._lock:
            self._append(asked, checked, notes)
        for name, values in checked.items():
            for at, value in zip(asked.missing, values, strict=True):
                asked.scores[name][at] = value

    def __len__(self) -> int:
        """Rollouts in the pool."""
        return len(self._pool)

    def close(self) -> None:
        """Give the pool back."""
        self._pool.close()

    def _digests(self) -> dict[int, int]:
        """Digest -> id of every rollout that is in the pool."""
        rows = self._pool.scan().filter(pl.col("key").str.starts_with(KEY)).select("seed", "id")
        return dict(rows.collect().iter_rows())

    def _digests_of(self, rollouts: Sequence[Rollout], step: int) -> list[int]:
        if step != self._step:
            self._step = step
            self._counts.clear()
        digests = []
        for rollout in rollouts:
            content = json.dumps(
                [
                    step,
                    rollout.prompt_text,
                    list(map(int, rollout.prompt_tokens)),
                    list(map(int, rollout.completion_tokens)),
                    sorted(self._columns),
                ]
            ).encode()
            self._counts[content] += 1
            counted = content + b"\n%d" % self._counts[content]
            digests.append(int.from_bytes(hashlib.sha256(counted).digest()[:8], "little"))
        return digests

    def _found(self, digests: Sequence[int]) -> dict[int, Sample]:
        """The samples of the rollouts that are known."""
        if self._known is None:
            return {}
        known = [digest for digest in digests if digest in self._known]
        samples = self._pool.samples([self._known[digest] for digest in known])
        return dict(zip(known, samples, strict=True))

    def _append(self, asked: Asked, scores: Scores, notes: Json) -> None:
        rollouts = [asked.rollouts[at] for at in asked.missing]
        digests = [asked.digests[at] for at in asked.missing]
        step = asked.step
        digest = hashlib.sha256(b"".join(d.to_bytes(8, "little") for d in digests)).hexdigest()
        prompts: dict[tuple[str, str], int] = {}
        records: list[PromptRecord] = []
        index = []
        for rollout in rollouts:
            metadata = _metadata(rollout.prompt_metadata)
            at = prompts.setdefault((rollout.prompt_text, metadata), len(prompts))
            if at == len(records):
                ids = np.array(rollout.prompt_tokens, np.uint32)
                records.append(
                    PromptRecord(token_ids=ids, text=rollout.prompt_text, metadata=metadata)
                )
            index.append(at)
        lengths = [len(rollout.completion_tokens) for rollout in rollouts]
        tokens = [np.array(rollout.completion_tokens, np.uint32) for rollout in rollouts]
        columns = {
            self._columns[name]: np.array(
                [math.nan if value is None else value for value in values], np.float32
            )
            for name, values in scores.items()
        }
        batch = SampleBatch(
            key=f"{KEY}{step}/{digest[:32]}",
            prompts=records,
            prompt_index=np.array(index, np.uint32),
            completion_tokens=np.concatenate(tokens),
            completion_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            completion_texts=[rollout.completion_text for rollout in rollouts],
            finish_reasons=np.array([self._finish_reason(r) for r in rollouts], np.uint8),
            round=step,
            chunk=0,
            policy_step=step,
            reward_tokens=np.full(len(rollouts), -1, np.int16),
            settings=json.dumps({"sink": dict(self._source), **_notes(notes)}, sort_keys=True),
            seeds=np.array(digests, np.uint64),
            scores={**columns, REWARD_COLUMN: self._reward(scores, len(rollouts))},
        )
        stored = self._pool.append(batch)
        if self._known is not None:
            self._known.update(zip(digests, stored, strict=True))

    def _finish_reason(self, rollout: Rollout) -> int:
        ends = rollout.completion_tokens
        is_finished = len(ends) > 0 and ends[-1] == self._eos
        return int(FinishReason.STOP if is_finished else FinishReason.UNKNOWN)

    def _reward(self, scores: Scores, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[N] the weighted sum of the scores that there are; NaN where there is none."""
        totals = np.full(count, np.nan, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for name, values in scores.items():
                for at, value in enumerate(values):
                    if value is not None:
                        part = self._weights.get(name, 1.0) * value
                        totals[at] = part if np.isnan(totals[at]) else totals[at] + part
        return totals


def _columns_of(names: Sequence[str]) -> dict[str, str]:
    """Name of a score -> its column in the pool."""
    columns: dict[str, str] = {}
    for name in names:
        column = column_name(name)
        column = "reward_function" if column == REWARD_COLUMN else column
        if name in columns or column in columns.values():
            raise ConfigError(
                f"two reward functions have the name {column!r} in a pool: give one of them another __name__"
            )
        columns[name] = column
    return columns


def _plain(value: float | None) -> float | None:
    """A score as a plain number that a pool holds exactly; None where there is none."""
    if value is None:
        return None
    with np.errstate(over="ignore"):  # a number that is too large is an infinity
        number = float(np.float32(value))
    return None if math.isnan(number) else number


def _notes(notes: Json) -> dict[str, Json]:
    kept = plain_json(notes)
    is_kept = kept is not None and len(json.dumps(kept)) <= MAX_NOTES_BYTES
    return {"notes": kept} if is_kept else {}


def _metadata(columns: Mapping[str, Json]) -> str:
    """The columns that have a JSON form and are not large, as one JSON object."""
    kept: dict[str, Json] = {}
    size = 0
    for name, value in columns.items():
        try:
            text = json.dumps(value, allow_nan=False)
            is_plain = plain_json(value) == json.loads(text)
        except (TypeError, ValueError, RecursionError):
            continue
        if (
            not is_plain
        ):  # the pool does not keep half of a character, or a whole number of many digits
            continue
        size += len(text) + len(name)
        if size > MAX_METADATA_BYTES:
            break
        kept[name] = value
    return json.dumps(kept, sort_keys=True)
