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


@pytest.mark.parametrize(
    "call", [4, 8], ids=["the last evaluation", "the end of the control curve"]
)
def test_a_signal_in_the_tail_leaves_with_75_and_without_a_model(call: int, tmp_path: Path) -> None:
    """A judge sends it: the original model is its first call, the control curve its last ones."""
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import os, pathlib, signal\n"
        f"counter = pathlib.Path({str(tmp_path / 'calls')!r})\n"
        "def f(prompts, completions):\n"
        "    number = int(counter.read_text()) + 1 if counter.exists() else 1\n"
        "    counter.write_text(str(number))\n"
        f"    if number == {call}:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [0.0] * len(completions)\n"
    )
    run_dir = tmp_path / "run"
    command = [
        "train",
        "--run-dir",
        run_dir,
        *TINY_RUN,
        "--set",
        f"evaluation.judges=['{judge}:f']",
    ]
    process = start(*command)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 75, err
    assert "before the result was published" in " ".join(err.split())
    assert not RunDirectory(run_dir).model.exists()
    assert '"event": "stop"' in RunDirectory(run_dir).metrics.read_text().splitlines()[-1]
    finished = quark(*command)
    assert finished.code == 0, finished.err
    assert RunDirectory(run_dir).model.exists()
