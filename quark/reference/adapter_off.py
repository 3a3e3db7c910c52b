"""The reference that is the policy itself with its adapters off: the same weights, once in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quark.models.batch import ModelInputs, TrainingBatch
from quark.models.causal import CausalModel, CompletionRows
from quark.models.lora import Adapter
from quark.models.policy import Policy
from quark.reference.base import ReferencePolicy


class AdapterOffReference(ReferencePolicy):
    """The original model, read through a policy whose own weights are frozen.

    Args:
        policy: with an adapter.
    """

    def __init__(self, policy: Policy) -> None:
        assert policy.adapter is not None
        self._causal = _AdapterOffModel(policy, policy.adapter)

    @property
    def causal(self) -> CausalModel:
        """The policy's model, run with its adapter switched off."""
        return self._causal

    def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
        """Run the model without the adapter, the reward tokens and gradients."""
        with torch.no_grad():
            return self.causal.run(batch.reference_inputs())


class _AdapterOffModel(CausalModel):
    """Runs with the adapters off, and leaves them on."""

    def __init__(self, policy: Policy, adapter: Adapter) -> None:
        # These are the policy's own modules, so no check has to be repeated.
        vars(self).update(vars(policy.causal))
        self._adapter = adapter

    def run(self, inputs: ModelInputs) -> CompletionRows:
        with self._adapter.off():
            return super().run(inputs)

    def next_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: Any = None,  # noqa: ANN401 - every architecture brings its own cache class
    ) -> tuple[Tensor, Any]:
        with self._adapter.off():
            return super().next_logits(input_ids, attention_mask, position_ids, cache)
