"""Where a run's results go: its directory, its checkpoints, its log and whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quark.config.schema import RunConfig
from quark.models.policy import Policy
from quark.run_directory import RunDirectory
from quark.training.events import TrainingResult
from quark.training.loop.journal import Journal
from quark.training.state.checkpoint import Checkpoints
from quark.training.state.model_publication import publish_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """The run directory and what is written there."""

    directory: RunDirectory
    run_id: str
    """In keys and logs."""
    fingerprint: Mapping[str, str]
    """What has to be equal for a resumed run to be the same run; goes into checkpoints."""
    checkpoints: Checkpoints
    config: RunConfig
    """Is shown in the model's card."""
    journal: Journal

    def publish(self, policy: Policy, result: TrainingResult) -> None:
        """Write the trained model.

        Raises:
            CheckpointError: the disk refused.
        """
        publish_model(self.directory, policy, self.config, result)
