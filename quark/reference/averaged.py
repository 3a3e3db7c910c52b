"""The reference that is an average of the policy's weights, which moves while the policy learns."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from quark.models.batch import TrainingBatch
from quark.models.causal import CausalModel, CompletionRows
from quark.models.policy import Policy
from quark.reference.base import ReferencePolicy


class AveragedReference(ReferencePolicy):
    """The policy's architecture around other weights, without a second copy of them.

    It reads ``averages`` where they are, so a change of them changes the reference. What the policy does not train
    is shared with it.

    Args:
        policy: whose weights are averaged.
        averages: float32, by the name of each trainable parameter of the policy's model.
    """

    def __init__(self, policy: Policy, averages: Mapping[str, Tensor]) -> None:
        memo: dict[int, object] = {id(buffer): buffer for buffer in policy.model.buffers()}
        for name, parameter in policy.model.named_parameters():
            memo[id(parameter)] = (
                nn.Parameter(averages[name], requires_grad=False)
                if parameter.requires_grad
                else parameter
            )
        model = copy.deepcopy(policy.model, memo)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                # Bound to the policy's layer where layers are recomputed, and of no use without a backward pass.
                module.__dict__.pop("forward", None)
        self._causal = CausalModel(model, num_leading_positions=policy.num_leading_positions)

    @property
    def causal(self) -> CausalModel:
        """The model around the averages."""
        return self._causal

    def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
        """Run the averaged model without the reward tokens and without gradients."""
        with torch.no_grad():
            return self.causal.run(batch.reference_inputs())
