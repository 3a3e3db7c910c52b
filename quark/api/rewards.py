"""Rewards from Python: built by name, or wrapped around an object."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quark.api.arguments import settings_table
from quark.config.load import load_config
from quark.rewards.base import RewardFunction
from quark.rewards.build import build_reward
from quark.rewards.config import RewardConfig
from quark.rewards.given import GivenReward


def reward(name: str, **settings: object) -> RewardFunction:
    """The reward that a name stands for, to be called or passed on.

    >>> short = quark.reward("length", length={"maximum": 3})  # doctest: +SKIP
    >>> short(prompts=["", ""], completions=["easy to use", "not so easy to use at all"])  # doctest: +SKIP
    [1.0, 0.4285714285714286]

    Args:
        name: as ``reward.name`` (``docs/rewards.md``).
        **settings: of the section ``reward``.

    Raises:
        ConfigError: a setting is unknown or does not fit.
        RewardError: the reward cannot be loaded.
    """
    return build_reward(_config({"name": name, **settings}))


def named_or_given(
    reward: object,
    settings: Mapping[str, object],
) -> tuple[RewardFunction, RewardConfig]:
    """A reward and its configuration.

    Raises:
        ConfigError: a setting is unknown or does not fit.
        RewardError: the reward cannot be loaded or called.
    """
    if isinstance(reward, str | Path):
        config = _config({"name": str(reward), **settings})
        return build_reward(config), config
    given = reward if isinstance(reward, GivenReward) else GivenReward(reward)
    config = _config({"name": given.setting, **settings})
    return build_reward(config, given), config


def _config(section: Mapping[str, object]) -> RewardConfig:
    return load_config(None, table=settings_table({"reward": section})).config.reward
