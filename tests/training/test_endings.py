"""However a run ends, nothing is lost, the log says how, and the same command goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quark.errors import ConfigError, QuarkError, TrainingError
from quark.run_directory import RunDirectory
from quark.training.loop.metrics import MetricLog
from tests.full_disk import file_size_limit
from tests.training.tiny_run import (
    NUM_ROUNDS,
    STEPS_PER_ROUND,
    Listener,
    fingerprint_of,
    rows_of,
    train,
    write_inputs,
)

NUM_STEPS = NUM_ROUNDS * STEPS_PER_ROUND


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def watched(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Listener:
    """What a run that nobody disturbs tells."""
    listener = Listener()
    train(config, tmp_path_factory.mktemp("watched") / "run", listener=listener)
    return listener


@pytest.fixture(scope="module")
def expected(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(config, run_dir)
    return fingerprint_of(run_dir)


def last_row(run_dir: Path) -> dict[str, Any]:
    row: dict[str, Any] = rows_of(run_dir)[-1]
    return row


def test_a_stop_anywhere_in_the_tail_is_obeyed_and_the_rest_is_the_same(
    config: Path, watched: Listener, expected: dict[str, Any], tmp_path: Path
) -> None:
    """From the last step on, to the last event before the model is published."""
    steps = [n for n, p in enumerate(watched.progress, start=1) if p.phase == "learning"]
    tail = range(steps[-1], len(watched.progress) + 1)
    assert (
        len(tail) >= 5
    )  # the last step, its evaluation, its checkpoint, the control curve, the model
    for number in tail:
        run_dir = tmp_path / f"run-{number}"
        assert train(config, run_dir, stop_at=number).interrupted, number
        row = last_row(run_dir)
        assert (row["event"], row["kind"], row["step"]) == ("stop", "interrupted", NUM_STEPS)
        assert row["round"] == NUM_ROUNDS - 1
        assert not RunDirectory(run_dir).model.exists()
        assert not train(config, run_dir).interrupted
        assert fingerprint_of(run_dir) == expected, number


def test_a_stop_after_everything_is_written_changes_nothing(config: Path, tmp_path: Path) -> None:
    result = train(config, tmp_path / "run", stop_at=10_000)
    assert not result.interrupted
    assert last_row(tmp_path / "run")["event"] == "end"


def test_a_run_that_fails_says_so_in_its_log_and_goes_on_byte_equal(
    config: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    def fail(number: int) -> None:
        if number == 21:
            raise OSError(28, "No space left on device", "/somewhere")

    run_dir = tmp_path / "run"
    with pytest.raises(OSError, match="No space left"):
        train(config, run_dir, listener=Listener(at_event=fail))
    row = last_row(run_dir)
    assert (row["event"], row["kind"]) == ("stop", "failed")
    assert row["reason"] == "OSError: [Errno 28] No space left on device: '/somewhere'"
    assert 0 < row["step"] < NUM_STEPS
    train(config, run_dir)
    assert fingerprint_of(run_dir) == expected


def test_an_interrupt_that_nobody_handles_is_told_as_one(config: Path, tmp_path: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", listener=Listener(at_event=interrupt))
    row = last_row(tmp_path / "run")
    assert (row["kind"], row["reason"]) == ("interrupted", "KeyboardInterrupt")


def test_a_row_that_the_disk_refused_leaves_no_half_of_itself(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, offset=0)
    log.write("step", 0, loss=1.0)
    before = path.read_bytes()
    with file_size_limit(len(before) + 10), pytest.raises(OSError, match="File too large"):
        log.write("step", 1, loss=2.0)
    assert path.read_bytes() == before
    log.write("stop", 1, kind="failed")
    log.close()
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["step", "stop"]


@pytest.mark.parametrize(("stop_at", "least"), [(None, 3), (21, 2)])
def test_fewer_rounds_than_are_done_are_refused_and_nothing_changes(
    config: Path, tmp_path: Path, stop_at: int | None, least: int
) -> None:
    run_dir = tmp_path / "run"
    train(config, run_dir, stop_at=stop_at)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name != "LOCK"}
    message = rf"run\.num_rounds is {least - 1}, but .* set it to at least {least},"
    with pytest.raises(ConfigError, match=message):
        train(config, run_dir, overrides=(f"run.num_rounds={least - 1}",))
    after = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name != "LOCK"}
    assert after == before
    assert train(config, run_dir).rounds == NUM_ROUNDS


def constant_reward(tmp_path: Path, then: str = "0.5") -> tuple[str, ...]:
    path = tmp_path / "constant.py"
    path.write_text(
        "calls = []\n"
        "def f(prompts, completions):\n"
        "    calls.append(1)\n"
        f"    return [0.5 if len(calls) <= 4 else {then} for i, _ in enumerate(completions)]\n"
    )
    return (f"reward.name={json.dumps(f'{path}:f')}", "run.num_rounds=3")


def test_a_constant_reward_is_told_in_the_first_round_before_anything_is_learned(
    config: Path, tmp_path: Path
) -> None:
    overrides = (*constant_reward(tmp_path), "alerts.flat_evaluations=1")
    listener = Listener()
    train(config, tmp_path / "run", overrides=overrides, listener=listener)
    rows = rows_of(tmp_path / "run")
    alerts = [row for row in rows if row["event"] == "alert"]
    # Once, and not as a model that does not learn.
    assert [(row["kind"], row["round"], row["step"]) for row in alerts] == [
        ("constant_reward", 0, 0)
    ]
    assert "all 24 scores of the first exploration are 0.5" in alerts[0]["text"]
    first_step = next(i for i, row in enumerate(rows) if row["event"] == "step")
    assert rows.index(alerts[0]) < first_step


def test_a_run_stopped_in_the_first_round_tells_a_constant_reward_once(
    config: Path, tmp_path: Path
) -> None:
    overrides = constant_reward(tmp_path)
    run_dir = tmp_path / "run"
    assert train(config, run_dir, overrides=overrides, stop_at=7).interrupted
    assert 0 < last_row(run_dir)["step"] < STEPS_PER_ROUND
    train(config, run_dir, overrides=overrides)
    assert [row["kind"] for row in rows_of(run_dir) if row["event"] == "alert"] == [
        "constant_reward"
    ]


def test_a_constant_reward_ends_the_run_where_alerts_do(config: Path, tmp_path: Path) -> None:
    overrides = (*constant_reward(tmp_path), "alerts.stop=true")
    with pytest.raises(TrainingError, match=r"alerts\.stop is set .*the reward is constant"):
        train(config, tmp_path / "run", overrides=overrides)
    assert last_row(tmp_path / "run")["reason"].startswith("TrainingError: alerts.stop is set")


@pytest.mark.parametrize(
    "override",
    ["model.name='/no/such/model'", "prompts.source='/no/such.jsonl'", "reward.name='./no.py:f'"],
)
def test_a_run_that_is_to_make_way_stays_where_the_new_one_cannot_begin(
    config: Path, expected: dict[str, Any], tmp_path: Path, override: str
) -> None:
    run_dir = tmp_path / "run"
    train(config, run_dir)
    with pytest.raises((QuarkError, FileNotFoundError), match="no"):
        train(config, run_dir, overrides=(override,), fresh=True, force=True)
    assert fingerprint_of(run_dir) == expected
    assert train(config, run_dir).rounds == NUM_ROUNDS
    assert fingerprint_of(run_dir) == expected


def test_what_a_start_that_failed_left_is_taken_over_by_a_fresh_one(
    config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text("")
    assert train(config, run_dir, fresh=True).rounds == NUM_ROUNDS
