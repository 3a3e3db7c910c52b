"""A run that was stopped, and the same run finished."""

from __future__ import annotations

import shutil
import signal
from typing import Any

import pytest

import quark
from quark.training.events import Silence
from tests.api.small import PROMPTS, SMALL
from tests.cli.commands import quark as command
from tests.tiny import save_tiny


class StopsAt(Silence):
    """Interrupts the run when it begins to learn in its last round, as Ctrl-C does."""

    def on_progress(self, progress: Any) -> None:
        if (progress.phase, progress.round) == ("learning", 1):
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> quark.Run:
    folder = tmp_path_factory.mktemp("runs")
    return quark.train(
        None,
        model=save_tiny(folder / "model"),
        prompts=PROMPTS,
        reward="length",
        run_dir=folder / "stopped",
        listener=StopsAt(),
        **SMALL,
    )


@pytest.fixture(scope="session")
def finished(stopped: quark.Run, tmp_path_factory: pytest.TempPathFactory) -> quark.Run:
    """The same run, resumed by the command with no other argument."""
    folder = shutil.copytree(stopped.path, tmp_path_factory.mktemp("done") / "finished")
    outcome = command("train", folder, "--quiet", "--json", "--allow", stopped.config.model.name)
    assert outcome.code == 0, outcome.err
    assert outcome.json["rounds"] == 2
    return quark.Run(folder)
