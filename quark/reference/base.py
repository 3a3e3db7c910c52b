"""What a reference policy is: the original model, which sees no reward token and never changes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quark.models.batch import TrainingBatch
from quark.models.causal import CausalModel, CompletionRows
from quark.models.logprobs import token_nll


class ReferencePolicy(Protocol):
    """p0 of Lu et al. 2022: the anchor of the KL penalty."""

    def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
        """The rows that predict the completions from the prompts alone; without gradient."""
        ...

    def sequence_logprobs(self, batch: TrainingBatch, *, base_vocab_size: int) -> Tensor:
        """float32 [B] log-probabilities of the completions over the base vocabulary, in nats."""
        ...


class FrozenReference:
    """A frozen copy of the original model.

    Args:
        model: put into eval mode; its parameters stop asking for gradients.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.causal = CausalModel(model)

    def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
        with torch.no_grad():
            return self.causal.run(batch.reference_inputs())

    def sequence_logprobs(self, batch: TrainingBatch, *, base_vocab_size: int) -> Tensor:
        rows = self.completion_rows(batch)
        nll = token_nll(rows, batch.targets, base_vocab_size=base_vocab_size)
        return -batch.sum_by_sequence(nll)
