"""The files of runs that were made before: read as they are, written in the same layout, and refused where newer."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quark.errors import CheckpointError, QuarkError, RunDirectoryError
from quark.evaluation.frontier_file import FrontierFile
from quark.run_directory import RunDirectory
from quark.run_identity import RunIdentity
from quark.training.position import Answer, Baseline, Position
from quark.training.state.checkpoint import Checkpoints, verify
from quark.training.state.held_out import read_held_out
from quark.training.state.run_state import (
    AlertsState,
    NewerStateError,
    PoolState,
    RunState,
    oldest_snapshot_needed,
    score_of,
)
from quark.types import Prompt
from tests.training.states import run_state

STATE = r"""{
 "format_version": 1,
 "step": 10,
 "score": null,
 "run_id": "66856c7048ce464da6a9b450b6213c79",
 "position": {
  "round": 2,
  "step_in_round": 2,
  "step": 10,
  "skipped_steps": 1,
  "skipped_in_a_row": 0,
  "micro_batch_size": 2,
  "totals": {
   "loss": 3.25,
   "kl": NaN
  },
  "totalled_steps": 1,
  "seconds": 1.675831399999879,
  "fresh": {
   "information_fresh": -0.25
  },
  "previous_bounds": [
   0.004000000189989805,
   0.33933332562446594,
   0.4050000011920929
  ],
  "held_out_best": Infinity,
  "held_out_rises": 1,
  "steps_braked": 0,
  "are_tokens_settled": true,
  "baseline": {
   "metrics": {
    "reward_mean": 0.48516666889190674,
    "distinct_2": NaN
   },
   "judges": {
    "diversity": 1.0
   },
   "answers": [
    [
     "say a",
     "+\u0003+\ufffdII",
     0.8393333554267883
    ],
    [
     "say b",
     "G\ufffdI",
     null
    ]
   ]
  }
 },
 "objective": {
  "kl_coef": 0.15286816939617243,
  "entropy_coef": 0.0
 },
 "alerts": {
  "active": [
   "information_flat",
   "kl"
  ],
  "largest_gap": 0.5,
  "num_gaps": 2,
  "largest_information": 0.25,
  "rounds_without_information": 2
 },
 "pool": {
  "generation": 5,
  "hash": "d7270a036c12c41a276d940fcaf7ebc3e6152e138433b0aef7ea6688531501a2",
  "samples": 36,
  "learns_from": 4
 },
 "metrics_bytes": 14511,
 "fingerprint": {
  "device": "cpu x86_64",
  "threads": "1"
 }
}
"""
IDENTITY = """{
 "format_version": 1,
 "run_id": "66856c7048ce464da6a9b450b6213c79",
 "quark_version": "0.1.0",
 "origins": {
  "run.seed": "file inputs/tiny.toml",
  "pool.held_out_share": "--set"
 },
 "scored_by": {
  "reward": {
   "tiny_reward.py": "bb63afe13c388b7054557885f265e79540cbe04302433499826eb2c88ae11e76"
  },
  "length": {}
 }
}
"""
HELD_OUT = (
    '{"prompt": "say é", "token_ids": [82, 64], "metadata": {"kind": 1}, "source": "inputs/prompts.jsonl", '
    '"source_sha256": "90fe"}\n'
    '{"prompt": "say b", "token_ids": [82], "metadata": {}, "source": "inputs/prompts.jsonl", "source_sha256": "90fe"}\n'
)
FRONTIER = (
    '{"format_version": 1, "reward": "x", "num_prompts": 4, "points": [{"quantile": 2, "guidance": 0.0, '
    '"reward": {"mean": 0.5, "low": 0.4, "high": 0.6}, "drift": {"mean": 1.0, "low": 0.9, "high": null}, '
    '"drift_per_token": 0.1, "judges": {"vader": {"mean": 0.5, "low": 0.4, "high": 0.6}}, "distinct_2": null, '
    '"length": 6.0, "perplexity": 71.8}], "picked": null}'
)
HERE = Path("run/checkpoints/step-00000010/state.json")


def test_every_part_of_a_state_is_read() -> None:
    state = RunState.of_text(STATE, HERE)
    totals = state.position.totals
    assert math.isnan(totals.pop("kl"))
    baseline = state.position.baseline
    assert baseline is not None
    assert math.isnan(baseline.metrics["distinct_2"])
    answers = (
        Answer(prompt="say a", completion="+\x03+\ufffdII", reward=0.8393333554267883),
        Answer(prompt="say b", completion="G\ufffdI", reward=None),
    )
    assert state == RunState(
        step=10,
        score=None,
        run_id="66856c7048ce464da6a9b450b6213c79",
        position=Position(
            round=2,
            step_in_round=2,
            step=10,
            skipped_steps=1,
            micro_batch_size=2,
            totals={"loss": 3.25},
            totalled_steps=1,
            seconds=1.675831399999879,
            fresh={"information_fresh": -0.25},
            previous_bounds=[0.004000000189989805, 0.33933332562446594, 0.4050000011920929],
            held_out_best=math.inf,
            held_out_rises=1,
            are_tokens_settled=True,
            baseline=Baseline(metrics=baseline.metrics, judges={"diversity": 1.0}, answers=answers),
        ),
        objective={"kl_coef": 0.15286816939617243, "entropy_coef": 0.0},
        alerts=AlertsState(
            active=frozenset({"kl", "information_flat"}),
            largest_gap=0.5,
            num_gaps=2,
            largest_information=0.25,
            rounds_without_information=2,
        ),
        pool=PoolState(
            generation=5,
            hash="d7270a036c12c41a276d940fcaf7ebc3e6152e138433b0aef7ea6688531501a2",
            samples=36,
            learns_from=4,
        ),
        metrics_bytes=14511,
        fingerprint={"device": "cpu x86_64", "threads": "1"},
    )


def test_a_state_is_written_as_it_was() -> None:
    assert RunState.of_text(STATE, HERE).to_text() == STATE
    empty = json.loads(STATE)
    empty["position"]["baseline"] = {}
    again = RunState.of_text(json.dumps(empty), HERE)
    assert again.position.baseline is None
    assert json.loads(again.to_text())["position"]["baseline"] == {}


@pytest.mark.parametrize(
    "names",
    [
        [("format_version",)],
        [("alerts",), ("score",)],
        [("alerts", "largest_information"), ("alerts", "rounds_without_information")],
        [("pool", "learns_from")],
        [("position", name) for name in ("held_out_best", "fresh", "previous_bounds", "baseline")],
        [("position", "baseline", name) for name in ("judges", "answers")],
    ],
)
def test_what_a_state_lacked_when_it_was_made_is_not_missed(names: list[tuple[str, ...]]) -> None:
    said = json.loads(STATE)
    for *places, last in names:
        part = said
        for place in places:
            part = part[place]
        del part[last]
    state = RunState.of_text(json.dumps(said), HERE)
    assert (state.step, state.pool.generation) == (10, 5)


def with_value(place: tuple[str, ...], value: object) -> str:
    said = part = json.loads(STATE)
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    return json.dumps(said)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("format_version",), "1"),
        (("format_version",), 0),
        (("step",), True),
        (("position",), []),
        (("position", "round"), -1),
        (("position", "totals"), {"loss": "3"}),
        (("position", "are_tokens_settled"), 1),
        (("position", "of_tomorrow"), 1),
        (("position", "baseline"), {"metrics": {}, "answers": [["only a prompt"]]}),
        (("alerts", "active"), "kl"),
        (("pool", "generation"), None),
        (("objective",), {"kl_coef": "0.1"}),
        (("hooks",), {"average": 3}),
        (("metrics_bytes",), 1.5),
        (("fingerprint",), {"threads": 1}),
        (("position", "seconds"), 10**400),
        (("position", "step"), 1 << 63),
        (("position", "micro_batch_size"), 0),
    ],
)
def test_a_state_that_makes_no_sense_is_refused_by_name(
    place: tuple[str, ...], value: object
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(str(HERE))):
        RunState.of_text(with_value(place, value), HERE)


def test_an_identity_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.identity.write_text(IDENTITY)
    identity = RunIdentity.read(run)
    assert identity.origins["pool.held_out_share"] == "--set"
    assert identity.scored_by is not None
    assert identity.scored_by["length"] == {}
    identity.write(run)
    assert run.identity.read_text() == IDENTITY
    run.identity.write_text('{"run_id": "a", "reward_sha256": "bb63"}')
    assert RunIdentity.read(run) == RunIdentity(run_id="a", reward_sha256="bb63")


def test_held_out_prompts_without_a_version_are_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.held_out.write_text(HELD_OUT)
    found = read_held_out(run)
    assert found is not None
    assert (found.source, found.source_sha256) == ("inputs/prompts.jsonl", "90fe")
    assert found.prompts == (
        Prompt(index=0, text="say é", token_ids=(82, 64), metadata={"kind": 1}),
        Prompt(index=1, text="say b", token_ids=(82,)),
    )


def test_a_frontier_is_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.frontier.write_text(FRONTIER)
    found = FrontierFile.read(run)
    assert found is not None
    assert found.points[0].judges["vader"].mean == 0.5
    assert json.dumps(found.to_json()) == FRONTIER


def newer(text: str) -> str:
    return "".join(
        json.dumps(json.loads(line) | {"format_version": 2}) + "\n" for line in text.splitlines()
    )


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("run.json", newer(json.dumps(json.loads(IDENTITY))), RunIdentity.read),
        ("held_out.jsonl", newer(HELD_OUT), read_held_out),
        ("frontier.json", newer(FRONTIER), FrontierFile.read),
    ],
)
def test_a_file_of_a_newer_quark_is_named_with_the_way_out(
    tmp_path: Path, name: str, content: str, read: Callable[[RunDirectory], Any]
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(
        RunDirectoryError, match=rf"{re.escape(name)} was written by a newer quark: .*Update quark"
    ):
        read(RunDirectory(tmp_path))


def save(run: RunDirectory, step: int, state: str | None = None) -> Path:
    path = Checkpoints(run.checkpoints, keep_last=5).save(
        run_state(step), weights={"weight": torch.eye(2)}, optimizer={}
    )
    if state is not None:
        (path / "state.json").write_text(state)
        manifest = json.loads((path / "manifest.json").read_bytes())
        digest = hashlib.sha256(state.encode()).hexdigest()
        manifest["state.json"] = {"bytes": len(state.encode()), "sha256": digest}
        (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_a_checkpoint_of_before_verifies_and_tells_what_it_needs(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    path = save(run, 10, STATE)
    assert verify(path).step == 10
    assert score_of(path) is None
    assert oldest_snapshot_needed(run) == 4
    (path / "state.json").write_text("{")
    assert oldest_snapshot_needed(run) is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_a_checkpoint_that_cannot_be_opened_now_is_not_skipped(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quark pool gc` would remove the snapshot that it needs."""
    run = RunDirectory(tmp_path)
    save(run, 10, STATE)

    def refusing(*_: object, **__: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("quark.training.state.run_state.read_bytes", refusing)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        oldest_snapshot_needed(run)
    monkeypatch.undo()
    assert oldest_snapshot_needed(run) == 4


def test_a_checkpoint_of_a_newer_quark_is_neither_skipped_nor_removed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    save(run, 1)
    path = save(run, 10, with_value(("format_version",), 2))
    checkpoints = Checkpoints(run.checkpoints, keep_last=2)
    for use in (
        lambda: verify(path),
        checkpoints.newest,
        lambda: checkpoints.save(run_state(10), weights={}, optimizer={}),
        lambda: oldest_snapshot_needed(run),
    ):
        with pytest.raises(QuarkError, match=r"state\.json was written by a newer quark"):
            use()
    assert path.is_dir()


def test_a_field_of_tomorrow_is_refused_and_not_taken_for_damage() -> None:
    with pytest.raises(NewerStateError, match="of_tomorrow"):
        RunState.of_text(with_value(("position", "of_tomorrow"), 1), HERE)
