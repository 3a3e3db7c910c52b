"""Scores a pool by another reward: what `quark pool rescore` and `Pool.rescore` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from quark.pool.native import NativePool
from quark.pool.rescore import Rescored
from quark.rewards.base import RewardFunction
from quark.rewards.build import reward_provenance
from quark.rewards.config import RewardConfig
from quark.rewards.scoring import score


def rescore(
    pool: NativePool,
    name: str,
    function: RewardFunction,
    config: RewardConfig,
    *,
    chunk_size: int,
    restart: bool,
    on_warning: Callable[[str], object],
    on_chunk: Callable[[int, int], object] | None = None,
) -> Rescored:
    """Score every sample of ``pool`` by ``function``, with the batches and retries of ``config``.

    Args:
        pool: open for writing.
        name: the score column.
        function: the reward.
        config: of the reward.
        chunk_size: samples per commit.
        restart: discard what an interrupted attempt has left.
        on_warning: is told once of each kind of failure.
        on_chunk: is told how many of how many samples are scored.

    Raises:
        RewardError, ValueError: as ``quark.pool.rescore.rescore`` and the reward say.
    """
    warned: set[str] = set()

    def scorer(prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.float32]:
        outcome = score(
            function,
            prompts,
            completions,
            on_error=config.on_error,
            batch_size=config.batch_size,
            retries=config.retries or 0,
        )
        for message in outcome.messages:
            if message not in warned:
                warned.add(message)
                on_warning(message)
        return outcome.scores

    return pool.rescore(
        name,
        scorer,
        source=reward_provenance(function),
        chunk_size=chunk_size,
        restart=restart,
        on_chunk=on_chunk,
    )
