"""A reward that fails now and then loses no sample, and a run that it stopped goes on as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quark.cli.exit_codes import ExitCode, exit_code_of
from quark.errors import RewardError
from quark.pool.native import NativePool
from tests.training.tiny_run import Listener, fingerprint_of, rows_of, train, write_inputs

SOURCE = '''
import pathlib
import time
import tiny_reward

marks = pathlib.Path({marks!r})

def reward(prompts, completions):
    """Does what a file asks for, once."""
    for mark in sorted(marks.iterdir()):
        mark.unlink()
        if mark.name.startswith("hang"):
            time.sleep(2.0)
        raise ConnectionError(mark.name)
    return tiny_reward.low_bytes(prompts, completions)
'''


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@pytest.fixture
def config(tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = write_inputs(tmp_path / "inputs")
    monkeypatch.syspath_prepend(str(path.parent))
    script = tmp_path / "flaky.py"
    script.write_text(SOURCE.format(marks=str(marks)))
    text = path.read_text().replace("tiny_reward.py:low_bytes", "../flaky.py:reward")
    path.write_text(text)
    return path


@pytest.fixture
def expected(config: Path, tmp_path: Path) -> dict[str, Any]:
    train(config, tmp_path / "whole")
    return fingerprint_of(tmp_path / "whole")


def leave(marks: Path, *names: str) -> None:
    for name in names:
        (marks / name).touch()


def asking(marks: Path, number: int, *names: str) -> Listener:
    """Lets the reward fail from the ``number``-th event on."""
    return Listener(at_event=lambda n: leave(marks, *names) if n == number else None)


def test_retries_hide_nothing_and_change_nothing(
    config: Path, marks: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    listener = asking(marks, 4, "fail-1", "fail-2")
    train(config, tmp_path / "run", overrides=("reward.retries=2",), listener=listener)
    said = [m for m in listener.messages if "called again 2 times" in m]
    assert len(said) == 1
    assert "ConnectionError: fail-1" in said[0]
    found = fingerprint_of(tmp_path / "run")
    assert found == expected


def test_a_failure_stops_the_run_and_the_same_command_goes_on(
    config: Path, marks: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(
        RewardError, match="'reward' raised on completions 0 to 7: ConnectionError"
    ) as error:
        train(config, tmp_path / "run", listener=asking(marks, 4, "fail"))
    assert exit_code_of(error.value) is ExitCode.INPUT
    with NativePool.open(tmp_path / "run" / "pool") as pool:
        assert len(pool) > 0
        assert not np.isnan(pool.scores("reward")).any()
    leave(marks, "again")
    patient = ("reward.retries=1", "reward.timeout_s=30")
    train(config, tmp_path / "run", overrides=patient)
    assert fingerprint_of(tmp_path / "run") == expected


def test_a_batch_that_hangs_is_kept_without_scores_counted_and_told(
    config: Path, marks: Path, tmp_path: Path
) -> None:
    listener = asking(marks, 4, "hang")
    settings = ("reward.timeout_s=1.0", "reward.on_error=nan")
    train(config, tmp_path / "run", overrides=settings, listener=listener)
    rows = [r for r in rows_of(tmp_path / "run") if r["event"] == "round"]
    assert [r["failed_scores"] for r in rows] == [8, 0, 0]
    with NativePool.open(tmp_path / "run" / "pool") as pool:
        assert len(pool) == 48
        assert np.isnan(pool.scores("reward")).sum() == 8
    assert any(
        "8 of 24 samples got no score" in m and "TimeoutError" in m for m in listener.messages
    )
    alerts = [r["kind"] for r in rows_of(tmp_path / "run") if r["event"] == "alert"]
    assert alerts == ["failed_scores"]


def test_a_further_score_that_fails_is_told_and_the_reward_is_not_touched(
    config: Path, marks: Path, tmp_path: Path
) -> None:
    listener = asking(marks, 4, "fail")
    flaky = json.dumps(f"{tmp_path / 'flaky.py'}:reward")
    settings = ('reward.name="length"', f"pool.extra_scores=[{flaky}]")
    train(config, tmp_path / "run", overrides=settings, listener=listener)
    assert any("8 of 24 samples got no score" in m and "flaky" in m for m in listener.messages)
    rows = [r for r in rows_of(tmp_path / "run") if r["event"] == "round"]
    assert [r["failed_scores"] for r in rows] == [0, 0, 0]
