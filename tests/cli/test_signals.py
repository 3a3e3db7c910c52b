"""A real run, interrupted."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from quark.run_directory import RunDirectory
from tests.cli.commands import TINY_RUN, quark, start

LONG_RUN = [*TINY_RUN, "--set", "run.steps_per_round=100000"]
"""Would learn for hours in its first round."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_cleanly_and_the_same_command_resumes(
    number: signal.Signals, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start("train", "--run-dir", run_dir, *LONG_RUN)
    try:
        wait_for_steps(run_dir)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "Ctrl-C again quits at once" in err
    assert "resume with: quark train --run-dir" in err.replace("\n", " ")
    assert "Traceback" not in err
    steps = num_steps(run_dir)
    assert steps > 0

    process = start("train", "--run-dir", run_dir, *LONG_RUN)
    try:
        wait_for_steps(run_dir, more_than=steps)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "continuing from the checkpoint" in err
    assert num_steps(run_dir) > steps


def test_an_interrupted_run_says_so_in_json_and_its_report_can_be_made(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start("train", "--run-dir", run_dir, *LONG_RUN, "--json")
    try:
        wait_for_steps(run_dir)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert '"interrupted": true' in out
    assert quark("report", run_dir, "--json").code == 0
    assert quark("pool", "info", run_dir, "--json").json["samples"] == 40


def num_steps(run_dir: Path) -> int:
    metrics = RunDirectory(run_dir).metrics
    return metrics.read_text(encoding="utf-8").count('"event": "step"') if metrics.exists() else 0


def wait_for_steps(run_dir: Path, more_than: int = 0) -> None:
    pause = threading.Event()
    for _ in range(600):
        if num_steps(run_dir) > more_than + 2:
            return
        pause.wait(0.1)
    raise AssertionError("the run took no step within a minute")
