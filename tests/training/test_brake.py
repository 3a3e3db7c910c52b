"""A round's steps end where the held-out samples say that the model begins to memorize."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from quark.config.schema import RunConfig
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.explain import explain
from quark.training.loop.brake import is_due, take_note
from quark.training.position import Position
from quark.training.state.run_state import RunState
from tests.training.launching import launch
from tests.training.tiny_run import (
    NUM_ROUNDS,
    Listener,
    fingerprint_of,
    rows_of,
    train,
    write_inputs,
)

NUM_STEPS = 8
SETTINGS = (
    "objective.lm_coef=0",
    "objective.contrast_coef=1.0",
    "objective.kl_coef=0.01",
    "objective.kl_target=0.5",
    "optimizer.learning_rate=0.03",
    "optimizer.warmup_steps=0",
    "pool.held_out_share=0.4",
    "run.seed=5",
    f"run.steps_per_round={NUM_STEPS}",
    "run.brake_every_steps=1",
)
"""Learns so fast that it memorizes within a round."""


def noted(*losses: float) -> Position:
    position = Position()
    for number, loss in enumerate(losses):
        position.step_in_round = number
        take_note(position, loss, num_steps=10)
    return position


@pytest.mark.parametrize(
    ("losses", "braked"),
    [
        ((1.0,), 0),
        ((1.0, 1.1), 0),
        ((1.0, 1.1, 1.2), 8),
        ((1.0, 1.1, 1.05), 8),  # above the best, though it falls
        ((1.0, 1.1, 0.9, 1.0), 0),
        ((1.0, 1.1, 1.0, 1.1), 0),  # as good as the best is no rise
        ((1.0, 0.5, 0.4, 0.6, 0.5), 6),
        ((1.0, math.nan, math.inf), 8),
        ((math.nan, 1.0, 1.1), 0),
    ],
)
def test_two_rises_in_a_row_above_the_best_are_one_too_many(
    losses: tuple[float, ...], braked: int
) -> None:
    assert noted(*losses).steps_braked == braked


def test_a_round_begins_without_the_memory_of_the_one_before() -> None:
    position = noted(1.0, 1.1, 1.2)
    position.begin_round(1)
    assert position == Position(round=1)


def test_measurements_come_before_the_first_step_and_after_every_few() -> None:
    position = Position()
    due = []
    for step in range(10):
        position.step_in_round = step
        if is_due(position, every=3, num_steps=9):
            due.append(step)
            take_note(position, 1.0, num_steps=9)
    assert due == [0, 3, 6], "after the last step there is nothing to leave out"
    position.step_in_round = 0
    assert not is_due(position, every=3, num_steps=9), "a resumed run has measured it"


def test_a_brake_needs_held_out_samples() -> None:
    with pytest.raises(ValidationError, match=r"pool\.held_out_share = 0 leaves none"):
        RunConfig.model_validate({"run": {"brake_every_steps": 4}})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def listener() -> Listener:
    return Listener()


@pytest.fixture(scope="module")
def whole_run(inputs: Path, listener: Listener, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert not train(inputs, run_dir, overrides=SETTINGS, listener=listener).interrupted
    return run_dir


def test_a_round_that_memorizes_ends_early_and_says_so(whole_run: Path, listener: Listener) -> None:
    rows = rows_of(whole_run)
    rounds = [row for row in rows if row["event"] == "round"]
    steps = [row for row in rows if row["event"] == "step"]
    assert len(rounds) == NUM_ROUNDS
    braked = {row["round"]: row["steps_braked"] for row in rounds}
    assert any(braked.values()), "the settings of this test memorize"
    for row in rounds:
        taken = [step for step in steps if step["round"] == row["round"]]
        assert len(taken) == NUM_STEPS - braked[row["round"]]
        measured = [
            each for each in rows if each["event"] == "held_out" and each["round"] == row["round"]
        ]
        losses = [each["contrast_loss"] for each in measured]
        assert len(losses) == min(len(taken) + 1, NUM_STEPS)
        if braked[row["round"]]:
            assert min(losses[-2:]) > min(losses)
    assert [row["step"] for row in steps] == list(range(len(steps)))
    said = [message for message in listener.messages if "steps are left out" in message]
    assert len(said) == sum(map(bool, braked.values()))


def test_the_learning_rate_goes_on_as_if_all_steps_had_been_taken(whole_run: Path) -> None:
    first: dict[int, float] = {}
    for row in rows_of(whole_run):
        if row["event"] == "step":
            first.setdefault(row["round"], row["learning_rate"])
    for round, rate in first.items():
        assert rate == pytest.approx(0.03 * (1 - round / NUM_ROUNDS)), "the schedule is linear"


@pytest.mark.parametrize("stop_at", [7, 9])
def test_a_braked_run_stopped_again_and_again_ends_equal(
    inputs: Path, whole_run: Path, tmp_path: Path, stop_at: int
) -> None:
    run_dir = tmp_path / "run"
    num_lives = 1
    while train(inputs, run_dir, stop_at=stop_at, overrides=SETTINGS).interrupted:
        num_lives += 1
        assert num_lives < 100
    assert num_lives > NUM_ROUNDS
    found, expected = fingerprint_of(run_dir), fingerprint_of(whole_run)
    for name in ("rows", "samples", "weights", "position", "coefficients"):
        assert found[name] == expected[name], name


def test_no_step_that_was_left_out_is_said_of_a_sample(whole_run: Path) -> None:
    taken = {row["step"]: row["round"] for row in rows_of(whole_run) if row["event"] == "step"}
    with NativePool.open(RunDirectory(whole_run).pool) as pool:
        explanations = [explain(whole_run, i) for i in range(len(pool))]
    said = {(step, use.round) for each in explanations for use in each.rounds for step in use.steps}
    assert said == set(taken.items())
    assert not any(use.steps_to_come for each in explanations for use in each.rounds)


def test_a_checkpoint_from_before_there_was_a_brake_loads(whole_run: Path) -> None:
    checkpoint = sorted(RunDirectory(whole_run).checkpoints.iterdir())[-1]
    path = checkpoint / "state.json"
    state = json.loads(path.read_bytes())
    for name in ("held_out_best", "held_out_rises", "steps_braked", "fresh"):
        del state["position"][name]
    assert RunState.of_text(json.dumps(state), path).position.steps_braked == 0


def test_two_processes_brake_together(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = launch(inputs, run_dir, *SETTINGS)
    assert ended.codes == [0, 0], ended.err
    rounds = [row for row in rows_of(run_dir) if row["event"] == "round"]
    assert any(row["steps_braked"] for row in rounds)
