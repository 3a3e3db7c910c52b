"""Reads the ranking rules of a run from its files, for reports, commands and the local page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quark.errors import ConfigError
from quark.pool.base import Quantization, SamplePool
from quark.pool.ranking import RankingRules
from quark.pool.standards import recorded_ensemble


def recorded_rules(config: Mapping[str, Any], standards: Path) -> RankingRules:
    """The rules of a run.

    Args:
        config: its parsed ``config.toml``; see ``RankingRules.recorded``.
        standards: its file of the scales of an ensemble's members; see ``recorded_ensemble``.
    """
    return replace(RankingRules.recorded(config), ensemble=recorded_ensemble(config, standards))


def rank_by_recorded(pool: SamplePool, rules: RankingRules) -> Quantization:
    """Rank a pool by recorded rules. Raises ConfigError if they are invalid."""
    try:
        return rules.quantize(pool)
    except (KeyError, ValueError, TypeError) as err:
        raise ConfigError(
            f"the run's config.toml does not say how its pool is ranked: {err}"
        ) from err
