"""Keeps the token critic in the checkpoints, so that a resumed run samples what an uninterrupted one does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quark.errors import CheckpointError
from quark.formats import number_in, whole_in
from quark.models.token_critic import CriticSlot, TokenCritic
from quark.training.loop.hooks import WeightHook
from quark.types import Json

NAME = "critic"
_SCORES = "scores"


class KeptCritic(WeightHook):
    """The policy's critic, from one round to the next.

    Args:
        critics: where the run puts the critic of each round.
        base_vocab_size: number of its scores.
    """

    name = NAME

    def __init__(self, critics: CriticSlot, *, base_vocab_size: int) -> None:
        self._critics = critics
        self._width = base_vocab_size
        self._said: Mapping[str, Json] = {}

    def state(self) -> Mapping[str, Json]:
        """What the critic says of itself; empty before the first round's steps."""
        critic = self._critics.critic
        if critic is None:
            return {}
        return {"explained": critic.explained, "num_samples": critic.num_samples}

    def load(self, state: Mapping[str, Json]) -> None:
        """Take up a state; the critic is there once its scores are."""
        self._said = state

    def tensors(self) -> Mapping[str, Tensor]:
        """Its scores."""
        critic = self._critics.critic
        return {} if critic is None else {_SCORES: torch.from_numpy(critic.scores)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the scores.

        Raises:
            KeyError: they are not there.
            ValueError: the state is not a critic's.
            CheckpointError: they are another vocabulary's, or not finite.
        """
        scores = tensors[_SCORES]
        if scores.shape != (self._width,) or not bool(torch.isfinite(scores).all()):
            raise CheckpointError(
                f"the checkpoint's critic has scores of shape {tuple(scores.shape)}, and {self._width} finite ones are "
                "needed: resume from another checkpoint"
            )
        self._critics.critic = TokenCritic(
            scores=scores.float().numpy(),
            explained=number_in(self._said["explained"]),
            num_samples=whole_in(self._said["num_samples"]),
        )
