"""Publishes the weights of a policy as a folder for another program, named by content and always complete."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from quark.errors import ModelError
from quark.models.policy import Policy
from quark.publication import clear_left_overs, publishing_directory
from quark.refusals import way_on
from quark.training.processes.process_group import checksum

INITIAL = "initial"


class PublishedWeights:
    """Keeps the initial weights and the newest ones under ``folder``.

    Args:
        folder: a folder for these weights only.
        policy: the policy with its initial weights.
    """

    def __init__(self, folder: Path, policy: Policy) -> None:
        self._folder = folder
        self._policy = policy
        self._initial = _version(policy)
        self._publish(folder / INITIAL)

    def initial(self) -> tuple[str, Path]:
        """Version and folder of the initial weights. Without a reward token they are the original model."""
        return self._initial, self._folder / INITIAL

    def newest(self) -> tuple[str, Path]:
        """Version and folder of the current weights, written if necessary.

        Raises:
            ModelError: a disk operation failed.
        """
        version = _version(self._policy)
        if version == self._initial:
            return self.initial()
        final = self._folder / f"weights-{version}"
        self._publish(final)
        return version, final

    def _publish(self, final: Path) -> None:
        if final.exists():
            return
        try:
            # The server holds the loaded weights in memory.
            for other in self._folder.glob("weights-*"):
                shutil.rmtree(other)
            self._folder.mkdir(parents=True, exist_ok=True)
            clear_left_overs(final)
            with publishing_directory(final) as staged:
                self._policy.save(staged, best_first=False)
        except OSError as err:
            raise ModelError(
                f"cannot write the weights for the server to {final}: {err}. Pool and checkpoints are good; {way_on(err)}"
            ) from err


def _version(policy: Policy) -> str:
    digest = hashlib.sha256()
    for name, parameter in policy.model.named_parameters():
        digest.update(f"{name} {checksum(parameter.detach())}\n".encode())
    return digest.hexdigest()[:16]
