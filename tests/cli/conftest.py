from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import TINY_RUN, Outcome, quark


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The outcome of one tiny ``quark train --json``."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    return quark("train", "--run-dir", run_dir, *TINY_RUN, "--json")


@pytest.fixture(scope="session")
def run_dir(trained: Outcome) -> Path:
    assert trained.code == 0, trained.err
    return Path(trained.json["run_dir"])
