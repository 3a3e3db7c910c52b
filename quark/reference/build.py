"""From a name to a reference."""

from __future__ import annotations

from typing import Literal

import torch

from quark.models.config import ModelConfig
from quark.models.loading import load_base_model
from quark.models.policy import Policy
from quark.models.positions import original_leading_positions
from quark.reference.base import FrozenReference, ReferencePolicy

ReferenceName = Literal["frozen", "adapter_off", "policy"]


def reference_name(policy: Policy) -> ReferenceName:
    """The reference that needs the least memory beside ``policy``."""
    if policy.is_frozen:
        return "policy"
    return "frozen" if policy.adapter is None else "adapter_off"


def build_reference(
    name: ReferenceName,
    config: ModelConfig,
    policy: Policy,
    device: torch.device,
    *,
    autocast_dtype: torch.dtype | None,
) -> ReferencePolicy:
    """The reference that ``name`` names.

    Args:
        name: ``frozen`` is a copy of the original model, ``adapter_off`` the policy with its adapters off,
            ``policy`` the policy itself, which nothing trains.
        config: of the original model.
        policy: is compared with it.
        device: of a copy.
        autocast_dtype: of the autocast under which alone a copy is run; None where there is none.

    Raises:
        ModelError: the original model cannot be found.
    """
    match name:
        case "adapter_off":
            from quark.reference.adapter_off import AdapterOffReference

            return AdapterOffReference(policy)
        case "policy":
            return FrozenReference(policy.model)
        case "frozen":
            original = load_base_model(config, device=device)
            has_leading = policy.num_leading_positions > 0
            return FrozenReference(
                original,
                autocast_dtype=autocast_dtype,
                num_leading_positions=original_leading_positions(original) if has_leading else 0,
            )
