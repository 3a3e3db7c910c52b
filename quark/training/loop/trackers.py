"""Trackers that show metrics elsewhere; each an extra, imported only when asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from quark.errors import ConfigError
from quark.installing import install_command


class Tracker(Protocol):
    """Shows numbers somewhere."""

    def log(self, numbers: Mapping[str, float], *, step: int) -> None:
        """Record numbers by name at optimizer step ``step``."""
        ...

    def close(self) -> None:
        """End the recording."""
        ...


class TensorBoardTracker:
    """Event files under ``run/tensorboard``."""

    def __init__(self, run_dir: Path) -> None:
        check_trackers(["tensorboard"])
        module: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def log(self, numbers: Mapping[str, float], *, step: int) -> None:
        """Write one scalar event for each number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out pending events and close the event file."""
        self._writer.close()


class RunTracker:
    """W&B, or trackio with the same interface; a resumed run continues under its id."""

    def __init__(
        self,
        package: str,
        run_dir: Path,
        *,
        project: str,
        run_id: str,
        config: Mapping[str, object],
    ) -> None:
        check_trackers([package])
        module: Any = importlib.import_module(package)
        arguments: dict[str, Any] = {
            "project": project,
            "name": run_dir.name,
            "config": dict(config),
        }
        if package == "wandb":
            arguments |= {"id": run_id, "resume": "allow", "dir": str(run_dir)}
        else:
            arguments["resume"] = "allow"
        self._run = module.init(**arguments)

    def log(self, numbers: Mapping[str, float], *, step: int) -> None:
        """Send the numbers to the tracking run as one record."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Finish the tracking run."""
        self._run.finish()


def make_trackers(
    names: Sequence[str],
    run_dir: Path,
    *,
    project: str,
    run_id: str,
    config: Mapping[str, object],
) -> list[Tracker]:
    """The trackers by name.

    Raises:
        ConfigError: a tracker's package is not installed; says how to install it.
    """
    return [
        TensorBoardTracker(run_dir)
        if name == "tensorboard"
        else RunTracker(name, run_dir, project=project, run_id=run_id, config=config)
        for name in names
    ]


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers' packages are installed, without importing them.

    Raises:
        ConfigError: one is not; says how to install it.
    """
    for package in names:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking.trackers names {package!r}, which is not installed: {install_command(package)}"
            )
