"""Checks whether a resumed run can end with the bytes of an uninterrupted one, and reports if it cannot."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

import quark
from quark.errors import CheckpointError, ConfigError
from quark.models.lora import frozen_digest
from quark.models.policy import Policy
from quark.training.events import TrainingListener
from quark.training.processes.process_group import ProcessGroup

FROZEN_WEIGHTS = "frozen weights"
"""Key of their digest in a fingerprint, for checkpoints that hold only adapters."""


@dataclass(frozen=True, slots=True)
class Exactness:
    """Reports reasons why a resumed run is not byte-exact, or refuses to resume.

    Args:
        is_required: whether to refuse.
        listener: receives the reasons otherwise.
    """

    is_required: bool
    listener: TrainingListener

    def check_device(self, device: torch.device) -> None:
        """Raise ConfigError if exactness is required on a device that does not provide it."""
        if self.is_required and device.type != "cpu":
            raise ConfigError(
                f"--require-exact: on {device.type} an operation need not give the same bits twice, so only runs on "
                "the CPU resume exactly: set run.device = cpu (for a new run), or leave the option out"
            )

    def void(self, reasons: Sequence[str]) -> None:
        """Report reasons why the rest of the run will differ. Does nothing if there are none.

        Raises:
            CheckpointError: exactness is required.
        """
        if not reasons:
            return
        if self.is_required:
            raise CheckpointError(
                "--require-exact: the rest of the run would not be byte-equal to an uninterrupted one:\n  "
                + "\n  ".join(reasons)
                + "\nBring these back, or leave the option out"
            )
        self.listener.on_message(
            f"the rest of the run will not be byte-equal to an uninterrupted one: {', '.join(reasons)}",
            level="warning",
        )


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Differences between the fingerprints of a checkpoint and of this process."""
    return [
        f"{key} {value} -> {now.get(key)}" for key, value in before.items() if now.get(key) != value
    ]


def make_fingerprint(
    device: torch.device, processes: ProcessGroup, policy: Policy
) -> dict[str, str]:
    """Facts that must be equal for a byte-exact resume: device kind, processes, threads, versions, frozen weights."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    adapter = {}
    if policy.adapter is not None:
        adapter = {"peft": version("peft"), FROZEN_WEIGHTS: frozen_digest(policy.model)}
    return {
        "device": f"{device.type} {name}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processes": f"{processes.size}{' sharded' if processes.is_sharded else ''}",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "quark": quark.__version__,
        **{
            package: version(package)
            for package in ("torch", "transformers", "tokenizers", "numpy")
        },
        **adapter,
    }
