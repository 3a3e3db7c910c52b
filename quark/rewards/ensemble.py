"""Several rewards as one: the mean of its members, each of which can be asked for its own scores, too.

A run stores every member's scores and ranks by a combination of them (``quark.pool.combiners``). The mean is what
people see as the reward.
"""

from __future__ import annotations

import functools
import json
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quark.rewards.base import RewardFunction
from quark.rewards.fields import Fields, FieldsAsked, call_with, fields_asked
from quark.rewards.scoring import score
from quark.types import Json

_Batch: TypeAlias = tuple[tuple[str, ...], tuple[str, ...], str]
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
        self.fields_asked: FieldsAsked = functools.reduce(operator.or_, map(fields_asked, members))
        """All fields of the prompts' rows that a member asks for."""
        self._retries = retries
        self._known: OrderedDict[_Batch, NDArray[np.float32]] = OrderedDict()

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **fields: Sequence[Json]
    ) -> Sequence[float | None]:
        """The mean score of each completion, None where a member gave none."""
        rows = [
            dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)
        ]
        scores = np.stack(
            [
                score(
                    member.reward,
                    prompts,
                    completions,
                    batch_size=max(len(completions), 1),
                    retries=self._retries,
                    rows=rows or None,
                ).scores
                for member in self.members
            ]
        )
        self._known[_batch(prompts, completions, fields)] = scores
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        means = scores.mean(0, dtype=np.float64)
        return [None if np.isnan(mean) else float(mean) for mean in means]

    def known(
        self, number: int, prompts: Sequence[str], completions: Sequence[str], fields: Fields
    ) -> NDArray[np.float32] | None:
        """A member's scores of a batch that the ensemble has just scored; None for another batch."""
        scores = self._known.get(_batch(prompts, completions, fields))
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

    @property
    def fields_asked(self) -> FieldsAsked:
        """Those of the ensemble, whose batches are known by all of them."""
        return self._ensemble.fields_asked

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **fields: Sequence[Json]
    ) -> Sequence[float | None]:
        """The member's own scores."""
        known = self._ensemble.known(self._number, prompts, completions, fields)
        if known is None:
            own = fields_asked(self.reward).among(fields)
            return call_with(self.reward, prompts, completions, own)
        return [None if np.isnan(value) else float(value) for value in known]


def _batch(prompts: Sequence[str], completions: Sequence[str], fields: Fields) -> _Batch:
    """What tells a batch from others: two rows may have the same texts and other fields."""
    return tuple(prompts), tuple(completions), json.dumps(fields, sort_keys=True)
