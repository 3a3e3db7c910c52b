"""How a run cuts its pool into quantiles: one set of rules for training, the report and the commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from quark.pool.base import Quantization, RemainderRule, SamplePool, TieRule
from quark.pool.columns import REWARD_COLUMN
from quark.pool.combiners import Ensemble
from quark.pool.defaults import NUM_QUANTILES
from quark.pool.scope import Scope, scores_by
from quark.pool.ties import tie_share


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingRules:
    """Everything that decides which quantile a sample of a snapshot is in.

    The fields but ``score`` and ``ensemble`` are settings of a configuration's ``[pool]`` table, under the same names.
    They are checked when a pool is quantized, so the rules of a damaged configuration can be made and replaced in part.
    """

    num_quantiles: int = NUM_QUANTILES
    """K."""
    score: str = REWARD_COLUMN
    """The score column to rank by."""
    ensemble: Ensemble | None = None
    """Rank by this combination of columns instead."""
    ties: TieRule = TieRule.HASH
    remainder: RemainderRule = RemainderRule.SPREAD
    last_rounds: int | None = None
    """This and the fields below are those of ``Scope``."""
    where: str | None = None
    min_score: float | None = None
    max_per_round: int | None = None
    per_prompt: bool = False

    @classmethod
    def recorded(cls, config: Mapping[str, Any]) -> Self:
        """The rules that the configuration of a run says, as parsed from its ``config.toml``.

        A key that is missing has its default, as in the file of an earlier release. So has a ``num_quantiles`` that
        is no positive integer. Other values are taken as they are.
        """
        section = config.get("pool")
        given = dict(section) if isinstance(section, dict) else {}
        num_quantiles = given.get("num_quantiles")
        if not isinstance(num_quantiles, int) or num_quantiles < 1:
            given.pop("num_quantiles", None)
        names = {field.name for field in fields(cls)} - {"score", "ensemble"}
        return cls(**{name: given[name] for name in names & given.keys()})

    @property
    def ranks_by(self) -> str | Ensemble:
        """The score column, or the combination of several."""
        return self.score if self.ensemble is None else self.ensemble

    def values(self, pool: SamplePool) -> NDArray[np.float32]:
        """[N] what the samples are ranked by, in id order; NaN where a sample has no score. Raises KeyError."""
        return scores_by(pool, self.ranks_by)

    def quantize(self, pool: SamplePool) -> Quantization:
        """Rank the pool's snapshot by these rules and cut the ranking.

        Raises:
            KeyError: an unknown score column.
            ValueError: a rule that no ranking obeys, or a ``where`` that is no condition on the columns that there are.
            TypeError: a rule of another type, from a configuration that was not validated.
        """
        scope = Scope(
            last_rounds=self.last_rounds,
            where=self.where,
            min_score=self.min_score,
            max_per_round=self.max_per_round,
            per_prompt=self.per_prompt,
        )
        return pool.quantize(
            self.num_quantiles,
            score=self.ranks_by,
            scope=scope,
            ties=self.ties,
            remainder=self.remainder,
        )

    def tie_share(self, pool: SamplePool, quantization: Quantization) -> float:
        """Share of the ranked samples whose quantile the tie rule chose; see ``quark.pool.ties.tie_share``.

        Args:
            pool: the snapshot that was quantized.
            quantization: what ``quantize`` returned for it.
        """
        prompt_ids = pool.column("prompt_id") if self.per_prompt else None
        return tie_share(self.values(pool), quantization.labels(), prompt_ids)
