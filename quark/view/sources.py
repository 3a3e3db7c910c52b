"""The runs and pools that a page shows, and what it may ask of them. All text in the answers is harmless to show."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from quark.errors import ConfigError, QuarkError
from quark.pool.columns import REWARD_COLUMN
from quark.pool.native import NativePool
from quark.pool.ranking import RankingRules
from quark.pool.recorded_ranking import rank_by_recorded, recorded_rules
from quark.pool.scope import Scope
from quark.printable import printable
from quark.report.load import figure, read_config, read_metrics
from quark.report.overview import runs_in
from quark.run_directory import RunDirectory
from quark.training.explain import explain
from quark.types import Json

PAGE_SIZE = 50
"""Samples in one answer."""
MOST_CHARACTERS = 4000
"""Of one text in an answer."""
_Z_95 = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A run, or a pool without one."""

    path: Path
    run: RunDirectory | None

    @property
    def pool(self) -> Path:
        """The pool's folder.

        Raises:
            UnsafeFileError: it is a link out of the run.
        """
        return self.path if self.run is None else self.run.own(self.run.pool)

    def rules(self) -> RankingRules:
        """How the run ranks its pool, or the defaults."""
        if self.run is None:
            return RankingRules()
        config = read_config(self.run.own(self.run.config))
        return recorded_rules(config, self.run.standards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which samples a page asks for."""

    text: str = ""
    """A part of the prompt or the completion."""
    round: int | None = None
    quantile: int | None = None
    where: str = ""
    """A condition in SQL, as ``pool.where``."""
    order: str = "newest"
    """``newest``, ``best`` or ``worst``."""
    offset: int = 0


def sources_of(paths: Sequence[Path]) -> tuple[Source, ...]:
    """The runs and pools at ``paths``; of a folder, all runs in it.

    Raises:
        ConfigError: there is none.
    """
    found: list[Source] = []
    for path in paths:
        run = RunDirectory(path)
        if run.is_run():
            found.append(Source(path=path, run=run))
        elif _is_pool(path):
            around = RunDirectory.around(path)
            found.append(Source(path=path, run=around if around.is_run() else None))
        else:
            inside = runs_in(path) if path.is_dir() else []
            found += [Source(path=each.path, run=RunDirectory(each.path)) for each in inside]
    if not found:
        said = ", ".join(map(str, paths))
        raise ConfigError(f"there is no run and no pool in {said}: name one, or a folder with runs")
    return tuple(found)


def _is_pool(path: Path) -> bool:
    try:
        NativePool.open(path).close()
    except (QuarkError, OSError, ValueError):
        return False
    return True


class Answers:
    """Answers a page's questions, one at a time, from the newest state on disk."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._lock = threading.Lock()
        self._labels: dict[tuple[int, int], NDArray[np.int16]] = {}

    def sources(self) -> list[Json]:
        """Name and kind of every source."""
        return [
            {
                "name": printable(str(source.path)),
                "kind": "pool" if source.run is None else "run",
                "quantiles": source.rules().num_quantiles,
            }
            for source in self._sources
        ]

    def rounds(self, index: int) -> list[Json]:
        """Of each round: samples, mean reward with its 95 % interval, and what the run measured.

        Raises:
            IndexError: there is no such source.
            QuarkError, OSError: it cannot be read.
        """
        source = self._sources[index]
        with self._lock, NativePool.open(source.pool) as pool:
            if REWARD_COLUMN not in pool.score_columns:
                return []
            table = (
                pool.scan()
                .select("round", REWARD_COLUMN)
                .group_by("round")
                .agg(
                    n=pl.len(),
                    mean=pl.col(REWARD_COLUMN).mean(),
                    std=pl.col(REWARD_COLUMN).std(),
                    scored=pl.col(REWARD_COLUMN).count(),
                )
                .sort("round")
                .collect()
            )
        logged: dict[object, Mapping[str, Json]] = {}
        if source.run is not None:
            rows, _ = read_metrics(source.run.own(source.run.metrics))
            logged = {_whole(row.get("round")): row for row in rows if row.get("event") == "round"}
        found: list[Json] = []
        for row in table.iter_rows(named=True):
            said = logged.get(row["round"], {})
            half = _Z_95 * (row["std"] or 0.0) / math.sqrt(row["scored"] or 1)
            found.append(
                {
                    "round": row["round"],
                    "n": row["n"],
                    "mean": _finite(row["mean"]),
                    "half": _finite(half),
                    "held_out": _finite(figure(said, "evaluation_reward_mean")),
                    "kl": _finite(figure(said, "evaluation_kl_sampled_to_reference")),
                }
            )
        return found

    def samples(self, index: int, wanted: Filter) -> dict[str, Json]:
        """At most ``PAGE_SIZE`` samples that fit, and how many do.

        Raises:
            IndexError: there is no such source.
            ValueError: the condition does not fit; says why.
            QuarkError, OSError: the source cannot be read.
        """
        source = self._sources[index]
        with self._lock, NativePool.open(source.pool) as pool:
            first = pool.num_removed
            fits = np.ones(len(pool), dtype=bool)
            fits[:first] = False
            labels = self._quantiles(index, pool, source.rules())
            if wanted.round is not None:
                fits &= pool.column("round") == wanted.round
            if wanted.quantile is not None:
                fits &= labels == wanted.quantile
            if wanted.where.strip():
                fits &= pool.quantize(1, scope=Scope(where=wanted.where)).labels() >= 0
            if wanted.text:
                text = pl.concat_str(
                    "prompt_text", "completion_text", separator="\n", ignore_nulls=True
                )
                rows = pool.scan().filter(text.str.contains(wanted.text, literal=True))
                has_text = np.zeros(len(pool), dtype=bool)
                has_text[rows.select("id").collect()["id"].to_numpy().astype(np.int64)] = True
                fits &= has_text
            ids = np.flatnonzero(fits)
            scores = (
                pool.scores(REWARD_COLUMN)
                if REWARD_COLUMN in pool.score_columns
                else np.full(len(pool), np.nan, np.float32)
            )
            shown = _page(ids, scores[ids], wanted)
            return {
                "total": len(ids),
                "offset": wanted.offset,
                "rows": [
                    {
                        "id": sample.id,
                        "round": sample.round,
                        "quantile": int(labels[sample.id]),
                        "reward": _finite(float(scores[sample.id])),
                        "prompt": _shown(sample.prompt_text),
                        "completion": _shown(sample.completion_text),
                    }
                    for sample in pool.samples(shown.tolist())
                ],
            }

    def explain(self, index: int, sample: int) -> dict[str, Json]:
        """Everything that is known about a sample.

        Raises:
            IndexError: there is no such source or sample.
            QuarkError, OSError: the source cannot be read.
        """
        source = self._sources[index]
        with self._lock:
            found = explain(source.path, sample)
        of = found.sample
        return {
            "id": of.id,
            "prompt": _shown(of.prompt_text),
            "prompt_metadata": _shown(of.prompt_metadata),
            "completion": _shown(of.completion_text),
            "tokens": len(of.completion_tokens),
            "round": of.round,
            "chunk": of.chunk,
            "policy_step": of.policy_step,
            "reward_token": of.reward_token,
            "seed": str(of.seed),
            "logprob_policy": _finite(of.logprob_policy),
            "logprob_reference": _finite(of.logprob_reference),
            "settings": _shown(of.settings),
            "key": _shown(found.key),
            "quantiles": found.num_quantiles,
            "scores": [
                {
                    **dataclasses.asdict(standing),
                    "column": printable(standing.column),
                    "score": _finite(standing.score),
                }
                for standing in found.standings
            ],
            "rounds": [
                {"round": use.round, "quantile": use.quantile, "steps": list(use.steps)}
                for use in found.rounds
            ],
        }

    def _quantiles(self, index: int, pool: NativePool, rules: RankingRules) -> NDArray[np.int16]:
        """[N] the quantile of each sample; kept until the pool changes."""
        if REWARD_COLUMN not in pool.score_columns:
            return np.full(len(pool), -1, np.int16)
        key = (index, pool.snapshot.generation)
        if key not in self._labels:
            self._labels = {k: v for k, v in self._labels.items() if k[0] != index}
            self._labels[key] = rank_by_recorded(pool, rules).labels().astype(np.int16)
        return self._labels[key]


def _page(ids: NDArray[np.int64], scores: NDArray[np.float32], wanted: Filter) -> NDArray[np.int64]:
    """The ids of one page, in the order that is asked for; samples without a score come last."""
    if wanted.order == "newest":
        ordered = ids[::-1]
    else:
        keys = -scores if wanted.order == "best" else scores
        end = wanted.offset + PAGE_SIZE
        ranked = np.where(np.isnan(keys), np.inf, keys)
        if end < len(ids):
            near = np.argpartition(ranked, end)[:end]
            ids, ranked = ids[near], ranked[near]
        ordered = ids[np.lexsort((ids, ranked))]
    return ordered[wanted.offset : wanted.offset + PAGE_SIZE]


def _shown(text: str | None) -> str:
    return "(the pool stores no text)" if text is None else printable(text, limit=MOST_CHARACTERS)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None
