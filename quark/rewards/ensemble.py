"""Several rewards as one: the mean of its members, each of which can be asked for its own scores, too.

A run stores every member's scores and ranks by a combination of them (``quark.pool.combiners``). The mean is what
people see as the reward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quark.rewards.base import RewardFunction
from quark.rewards.scoring import score
from quark.types import Json

_Batch: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]
_REMEMBERED = 64
"""Batches whose scores are kept until the members are asked for theirs."""


class EnsembleReward:
    """The mean of the members' scores; no score where one of them has none.

    Args:
        members: at least one.
        provenance: where the scores come from.
        retries: how often a member that raised is asked again.
    """

    name = "ensemble"

    def __init__(
        self,
        members: Sequence[RewardFunction],
        *,
        provenance: Mapping[str, Json],
        retries: int = 0,
    ) -> None:
        self.provenance = provenance
        self.members = tuple(
            EnsembleMember(self, number, member) for number, member in enumerate(members)
        )
        self._retries = retries
        self._known: OrderedDict[_Batch, NDArray[np.float32]] = OrderedDict()

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str]
    ) -> Sequence[float | None]:
        """The mean score of each completion, None where a member gave none."""
        scores = np.stack(
            [
                score(
                    member.reward,
                    prompts,
                    completions,
                    batch_size=max(len(completions), 1),
                    retries=self._retries,
                ).scores
                for member in self.members
            ]
        )
        self._known[tuple(prompts), tuple(completions)] = scores
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        means = scores.mean(0, dtype=np.float64)
        return [None if np.isnan(mean) else float(mean) for mean in means]

    def known(
        self, number: int, prompts: Sequence[str], completions: Sequence[str]
    ) -> NDArray[np.float32] | None:
        """A member's scores of a batch that the ensemble has just scored; None for another batch."""
        scores = self._known.get((tuple(prompts), tuple(completions)))
        return None if scores is None else scores[number]


class EnsembleMember:
    """One member of an ensemble; a batch that the ensemble has just scored is not scored again."""

    def __init__(self, ensemble: EnsembleReward, number: int, reward: RewardFunction) -> None:
        self._ensemble = ensemble
        self._number = number
        self.reward = reward

    @property
    def name(self) -> str:
        """The name of the reward."""
        return self.reward.name

    @property
    def provenance(self) -> Mapping[str, Json]:
        """The origin of the reward."""
        found: Mapping[str, Json] = getattr(self.reward, "provenance", {})
        return found

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str]
    ) -> Sequence[float | None]:
        """The member's own scores."""
        known = self._ensemble.known(self._number, prompts, completions)
        if known is None:
            return self.reward(prompts=prompts, completions=completions)
        return [None if np.isnan(value) else float(value) for value in known]
