"""Which checkpoints stay, and what a disk that is too small leaves behind."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from quark.errors import CheckpointError
from quark.training.state.checkpoint import Checkpoints, verify
from tests.training.states import run_state


def save(checkpoints: Checkpoints, step: int, score: float | None = None) -> Path:
    weights = {"weight": torch.eye(2)}
    moments = {"weight/exp_avg": torch.full((2, 2), float(step))}
    return checkpoints.save(run_state(step, score=score), weights=weights, optimizer=moments)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


@pytest.mark.parametrize("keep_last", [0, 1, 2, 3])
def test_the_last_ones_stay_and_never_fewer_than_two(tmp_path: Path, keep_last: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=keep_last)
    for step in range(5):
        save(checkpoints, step)
        assert len(steps_in(tmp_path)) >= min(step + 1, 2)
    assert steps_in(tmp_path) == list(range(5))[-max(keep_last, 2) :]


def test_the_best_ones_stay_besides_the_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=2)
    for step, score in enumerate([0.1, 0.9, math.nan, 0.8, 0.2, None, 0.8, 0.3]):
        save(checkpoints, step, score)
    # Of the two with 0.8 the later stays.
    assert steps_in(tmp_path) == [1, 6, 7]
    newest, rejected = checkpoints.newest()
    assert newest is not None
    assert (newest.step, rejected) == (7, [])


def test_a_damaged_one_counts_neither_as_last_nor_as_best(tmp_path: Path) -> None:
    for step, score in ((1, 0.9), (2, 0.1), (3, 0.2)):
        save(Checkpoints(tmp_path, keep_last=5), step, score)
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1)
    newest, rejected = checkpoints.newest()
    assert newest is not None
    assert newest.step == 2
    assert len(rejected) == 1
    save(checkpoints, 4, 0.0)
    assert {1, 2, 4} <= set(steps_in(tmp_path))


def test_what_does_not_fit_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1)
    too_large = {"weight/exp_avg": torch.zeros(1).expand(1 << 50)}
    with pytest.raises(
        CheckpointError, match=r"needs 4,503,599,627\.4 MB.*the disk has .* MB left"
    ):
        checkpoints.save(run_state(2), weights={}, optimizer=too_large)
    assert steps_in(tmp_path) == [1]
    newest, _ = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1


@pytest.mark.parametrize("step", [1e999, None, [], "x"])
def test_a_step_that_is_no_number_is_refused_although_its_sum_is_right(
    tmp_path: Path, step: object
) -> None:
    path = save(Checkpoints(tmp_path, keep_last=2), 1)
    state, manifest = path / "state.json", path / "manifest.json"
    content = json.dumps(json.loads(state.read_bytes()) | {"step": step}).encode()
    state.write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"state.json": entry}))
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        verify(path)


def test_a_checkpoint_under_the_name_of_another_step_is_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1)
    save(checkpoints, 2).rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match=r"state\.json is of step 2"):
        verify(tmp_path / "step-00000009")
    newest, rejected = checkpoints.newest()
    assert newest is not None
    assert (newest.step, len(rejected)) == (1, 1)
