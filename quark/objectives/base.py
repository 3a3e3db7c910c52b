"""The protocol of an objective. The learner uses only this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from quark.models.batch import TrainingBatch
from quark.models.causal import CompletionModel
from quark.models.policy import Policy
from quark.objectives.tilt import TokenTilt

Columns = Mapping[str, NDArray[Any]]
"""[N] columns of a pool by name, one value for each sample; ``reward`` is the score that is trained on."""


class Loss(Protocol):
    """The loss of one micro-batch and the figures that belong to it."""

    @property
    def loss(self) -> Tensor:
        """Scalar with gradient; micro-batch losses add up to the whole batch's."""
        ...

    @property
    def sums(self) -> Mapping[str, float]:
        """Sums over the micro-batch's tokens or sequences, by name; alike in every micro-batch of a step."""
        ...


class Objective(Protocol):
    """Computes the loss of a minibatch, and holds what changes from step to step."""

    @property
    def pool_columns(self) -> tuple[str, ...]:
        """Columns of the pool that ``begin_round`` is given; empty for none."""
        ...

    @property
    def batch_fields(self) -> tuple[str, ...]:
        """Fields of ``TrainingBatch``, besides the samples' own, that ``fields`` may give."""
        ...

    def begin_round(self, columns: Columns) -> None:
        """Take in ``pool_columns`` of the snapshot that the round learns from."""
        ...

    @property
    def tilt_strength(self) -> float | None:
        """Strength of the tilt toward the best token (``take_tilt``); None if the objective uses no tilt."""
        return None

    def take_tilt(self, tilt: TokenTilt) -> None:  # noqa: ARG002 - most want none
        """Take in the tilt of the snapshot that the round learns from, after ``begin_round``."""
        return

    def fields(
        self,
        ids: NDArray[Any],
        quantiles: NDArray[Any],
        *,
        reward_tokens: Sequence[int],
        seed: int,
    ) -> Mapping[str, NDArray[Any]]:
        """The batch fields of a whole minibatch, [B, ...] each.

        Args:
            ids: [B] the samples.
            quantiles: [B] theirs.
            reward_tokens: [K] token ids, by quantile.
            seed: of this step's draws, the same in every process.
        """
        ...

    def micro_batches(self, batch: TrainingBatch, number: int) -> list[TrainingBatch]:
        """``batch`` divided into ``number`` micro-batches or more, for one call and one backward pass each."""
        ...

    def __call__(
        self,
        policy: Policy,
        reference: CompletionModel,
        batch: TrainingBatch,
        *,
        num_sequences: int,
        num_tokens: int,
    ) -> Loss:
        """The loss of a micro-batch, a part of an effective batch of the given size. Gradients reach the policy alone."""
        ...

    def figures(
        self, sums: Mapping[str, float], *, num_sequences: int, num_tokens: int, num_quantiles: int
    ) -> dict[str, float]:
        """Figures of a step, named as in its row of the log, from its sums over all processes."""
        ...

    def after_step(self, sums: Mapping[str, float], *, num_sequences: int) -> None:
        """Take in the sums of a step that was not skipped."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What changes from step to step, as plain numbers; is in every checkpoint and every step's row."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up a state that ``state_dict`` gave."""
        ...
