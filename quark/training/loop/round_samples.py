"""What a round learns from: the pool as its exploration left it, the new samples, and the ranking of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from quark.config.schema import PoolSection
from quark.errors import TrainingError
from quark.pool.base import Quantization, SamplePool
from quark.pool.columns import REWARD_COLUMN
from quark.pool.combiners import Ensemble
from quark.pool.native import NativePool
from quark.pool.scope import Score
from quark.training.loop.draws import first_snapshot_with, quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSamples:
    """A snapshot of the pool, ranked."""

    pool: NativePool
    """As it was when the round's exploration was complete."""
    new: range
    """Ids of the samples that the round explored, without those that retention removed."""
    quantization: Quantization
    ensemble: Ensemble | None = None
    """What ranks them, where that is not the column ``reward``."""

    @property
    def score(self) -> Score:
        """What ranks them."""
        return REWARD_COLUMN if self.ensemble is None else self.ensemble

    @classmethod
    def of(
        cls,
        path: Path,
        explored: range,
        section: PoolSection,
        *,
        ensemble_of: Callable[[SamplePool], Ensemble | None] = lambda _: None,
    ) -> Self:
        """The samples of the pool at ``path`` after the exploration that brought the ids ``explored``.

        Args:
            path: of the pool.
            explored: ids of the exploration.
            section: how samples are ranked.
            ensemble_of: what ranks them in a snapshot, where that is not the column ``reward``.

        Raises:
            TrainingError: the pool has no such snapshot, or it holds nothing that can be ranked.
            ConfigError: ``pool.where`` is no condition on the columns that there are.
        """
        pool = _snapshot(path, explored.stop)
        ensemble = ensemble_of(pool)
        return cls(
            pool=pool,
            new=range(max(explored.start, pool.num_removed), explored.stop),
            quantization=_ranking(pool, section, ensemble),
            ensemble=ensemble,
        )

    @property
    def reward_version(self) -> int:
        """How often all rewards were made."""
        return reward_version(self.pool)


def reward_version(pool: NativePool) -> int:
    """How often all rewards of ``pool`` were made; 0 without any."""
    versions = {column.name: column.version for column in pool.info().score_columns}
    return versions.get(REWARD_COLUMN, 0)


def _snapshot(path: Path, num_samples: int) -> NativePool:
    """The pool when it held ``num_samples`` samples.

    It can be ahead of that where the run resumed from an older checkpoint, or was made to hold less.
    """
    pool = first_snapshot_with(path, num_samples)
    if len(pool) != num_samples:
        raise TrainingError(
            f"{path} has samples that this run did not put there, or lacks its older "
            f"snapshots: none holds {num_samples} samples"
        )
    return pool


def _ranking(pool: NativePool, section: PoolSection, ensemble: Ensemble | None) -> Quantization:
    quantization = quantize(pool, section.ranking(ensemble=ensemble))
    if int(quantization.counts.sum()):
        return quantization
    num_samples = len(pool) - pool.num_removed
    asked = {key: getattr(section, key) for key in ("last_rounds", "where", "min_score")}
    asked = {key: value for key, value in asked.items() if value is not None}
    if asked and not np.isnan(pool.scores(REWARD_COLUMN)[pool.num_removed :]).all():
        said = " and ".join(f"pool.{key} = {value!r}" for key, value in asked.items())
        raise TrainingError(
            f"none of the {num_samples} samples fulfils {said}: start a run that asks for less (--run-dir)"
        )
    raise TrainingError(
        f"none of the {num_samples} samples has a score: check the reward with `quark reward check`"
    )
