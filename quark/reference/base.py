"""The interface of a reference policy: the original model, which sees no reward token and never changes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quark.models.batch import TrainingBatch
from quark.models.causal import CausalModel, CompletionRows
from quark.models.logprobs import token_nll
from quark.models.precision import convert_projections


class ReferencePolicy(Protocol):
    """p0 of Lu et al. 2022: the anchor of the KL penalty."""

    @property
    def causal(self) -> CausalModel:
        """The original model, to sample from."""
        ...

    def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
        """The rows that predict the completions from the prompts alone; without gradient."""
        ...

    def prepare(self, sample_ids: Sequence[int]) -> None:  # noqa: ARG002 - most need no preparation
        """Receive the ids of the samples of the next training step. All processes call this together."""
        return

    def gathered(self) -> AbstractContextManager[None]:
        """Within the context, this process can run the reference alone. All processes enter and leave it together."""
        return nullcontext()

    def sequence_logprobs(
        self,
        batch: TrainingBatch,
        *,
        base_vocab_size: int,
        is_block: bool = False,  # noqa: ARG002 - most have no use for it
    ) -> Tensor:
        """float32 [B] log-probabilities of the completions over the base vocabulary, in nats.

        Args:
            batch: with or without reward tokens, which p0 does not see.
            base_vocab_size: number of leading columns that are compared.
            is_block: these samples go into the pool together, and steps will learn from them.
        """
        rows = self.completion_rows(batch)
        nll = token_nll(rows, batch.targets, base_vocab_size=base_vocab_size)
        return -batch.sum_by_sequence(nll)


class FrozenReference(ReferencePolicy):
    """A frozen copy of the original model.

    Args:
        model: put into eval mode; its parameters stop asking for gradients.
        autocast_dtype: that of the autocast under which alone the reference will be run: its projections
            are stored in it, which changes no result and saves time and memory. None keeps the weights.
        num_leading_positions: the position at which texts begin (``original_leading_positions``).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        autocast_dtype: torch.dtype | None = None,
        num_leading_positions: int = 0,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._causal = CausalModel(model, num_leading_positions=num_leading_positions)
        if autocast_dtype is not None:
            convert_projections(model, autocast_dtype)

    @property
    def causal(self) -> CausalModel:
        """The frozen model."""
        return self._causal

    def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
        """Run the frozen model without the reward tokens and without gradients."""
        with torch.no_grad():
            return self.causal.run(batch.reference_inputs())
