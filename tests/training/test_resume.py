from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quark.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    PoolLockedError,
    QuarkError,
    RunDirectoryError,
)
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.state.checkpoint import verify
from tests.cli.commands import quark
from tests.training.tiny_run import (
    NUM_ROUNDS,
    STEPS_PER_ROUND,
    Listener,
    fingerprint_of,
    rows_of,
    train,
    write_inputs,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert not train(config, run_dir).interrupted
    return run_dir


@pytest.fixture(scope="module")
def expected(whole_run: Path) -> dict[str, Any]:
    return fingerprint_of(whole_run)


@pytest.fixture
def stopped_run(config: Path, tmp_path: Path) -> Path:
    """Stopped inside the second round's learning."""
    run_dir = tmp_path / "run"
    assert train(config, run_dir, stop_at=21).interrupted
    return run_dir


def test_the_log_of_a_whole_run_has_every_row_once(expected: dict[str, Any]) -> None:
    rows = expected["rows"]
    assert rows[0]["event"] == "run"
    assert [r["step"] for r in rows if r["event"] == "step"] == list(
        range(NUM_ROUNDS * STEPS_PER_ROUND)
    )
    assert [r["round"] for r in rows if r["event"] == "round"] == list(range(NUM_ROUNDS))
    evaluated = [r["quantile"] for r in rows if r["event"] == "evaluation"]
    assert evaluated == [None, *[2, 0] * (NUM_ROUNDS - 1), 2, 0, 1]
    assert [r["event"] for r in rows[-2:]] == ["control_curve", "end"]


def test_a_run_stopped_again_and_again_ends_equal(
    config: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    num_lives = 1
    while train(config, run_dir, stop_at=7).interrupted:
        num_lives += 1
        assert num_lives < 100
    assert num_lives > NUM_ROUNDS
    assert fingerprint_of(run_dir) == expected


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_equal() -> None:
    """A few of the trials that scripts/kill_trials.py makes by the hundred."""
    script = Path(__file__).parents[2] / "scripts" / "kill_trials.py"
    done = subprocess.run(
        [sys.executable, script, "--trials", "6", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("6 of 6 runs killed and resumed ended byte-equal")


def test_committed_chunks_are_replayed_and_not_generated_again(
    config: Path, expected: dict[str, Any], whole_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    run = RunDirectory(run_dir)
    checkpoints = sorted(run.checkpoints.iterdir())
    shutil.rmtree(checkpoints[-1])  # as if killed after the last round's exploration
    listener = Listener()
    train(config, run_dir, listener=listener)
    assert f"step {verify(checkpoints[-2]).step}" in "\n".join(listener.messages)
    assert not any("generated" in message for message in listener.messages)
    assert fingerprint_of(run_dir) == expected


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    config: Path,
    expected: dict[str, Any],
    whole_run: Path,
    tmp_path: Path,
    file: str,
    damage: str,
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    older, newest = sorted(RunDirectory(run_dir).checkpoints.iterdir())[-2:]
    target = newest / file
    content = bytearray(target.read_bytes())
    if damage == "delete":
        target.unlink()
    else:
        content[len(content) // 2] ^= 1
        target.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=re.escape(str(newest))):
        verify(newest)
    listener = Listener()
    train(config, run_dir, listener=listener)
    assert any("rejected" in m and str(newest) in m for m in listener.messages)
    assert any(f"step {verify(older).step}" in m for m in listener.messages)
    assert fingerprint_of(run_dir) == expected


def test_resuming_a_finished_run_changes_nothing(
    config: Path, expected: dict[str, Any], whole_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    result = train(config, run_dir)
    assert not result.interrupted
    assert fingerprint_of(run_dir) == expected


def test_resuming_says_so_and_from_where(config: Path, stopped_run: Path) -> None:
    listener = Listener()
    train(config, stopped_run, listener=listener)
    text = "\n".join(listener.messages)
    assert f"resuming the run in {stopped_run}" in text
    assert "continuing from the checkpoint of step" in text


def test_a_changed_setting_is_named_and_refused(config: Path, stopped_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: 0\.001 -> 0\.01"):
        train(config, stopped_run, overrides=("optimizer.learning_rate=0.01",))


def test_harmless_settings_may_change(config: Path, stopped_run: Path) -> None:
    settings = ("run.num_rounds=4", "checkpoint.keep_last=3", "evaluation.show_prompts=1")
    result = train(config, stopped_run, overrides=settings)
    assert result.rounds == 4
    assert len(result.before_after) == 1


def test_smaller_parts_may_be_asked_for_and_void_exactness(config: Path, stopped_run: Path) -> None:
    override = ("optimizer.micro_batch_size=2",)
    with pytest.raises(CheckpointError, match=r"optimizer\.micro_batch_size 4 -> 2"):
        train(config, stopped_run, overrides=override, require_exact=True)
    listener = Listener()
    train(config, stopped_run, overrides=override, listener=listener)
    assert any("optimizer.micro_batch_size 4 -> 2" in message for message in listener.messages)
    steps = [row for row in rows_of(stopped_run) if row["event"] == "step"]
    assert {row["micro_batch_size"] for row in steps} == {4, 2}


def test_layers_may_be_recomputed_from_here_on_and_no_byte_changes(
    config: Path, expected: dict[str, Any], stopped_run: Path
) -> None:
    train(config, stopped_run, overrides=("model.gradient_checkpointing=true",), require_exact=True)
    assert fingerprint_of(stopped_run) == expected


def test_changed_prompts_are_refused(config: Path, stopped_run: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    shutil.copytree(config.parent, inputs)
    prompts = inputs / "prompts.jsonl"
    source = config.parent / "prompts.jsonl"
    original = source.read_text()
    try:
        for changed in (("three", "thirteen"), ("say c", "say z")):
            source.write_text(original.replace(*changed))
            with pytest.raises(DataError, match="not those"):
                train(config, stopped_run)
        # As of a run that an older quark began.
        RunDirectory(stopped_run).held_out.unlink()
        with pytest.raises(DataError, match="an older quark began"):
            train(config, stopped_run)
    finally:
        source.write_text(original)
    assert prompts.read_text() == original
    train(config, stopped_run)
    assert len(RunDirectory(stopped_run).held_out.read_text().splitlines()) == 4


def test_a_pool_of_another_history_is_refused(
    config: Path, stopped_run: Path, whole_run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert train(config, other, stop_at=14).interrupted
    shutil.rmtree(stopped_run / "pool")
    shutil.copytree(other / "pool", stopped_run / "pool")
    with pytest.raises(CheckpointError, match="replaced or rolled back"):
        train(config, stopped_run)


def test_fresh_refuses_a_run_and_force_deletes_only_what_is_ours(
    config: Path, expected: dict[str, Any], stopped_run: Path
) -> None:
    with pytest.raises(RunDirectoryError, match="--force"):
        train(config, stopped_run, fresh=True)
    mine = stopped_run / "notes.txt"
    mine.write_text("keep me")
    other = RunDirectory(stopped_run).checkpoints / "mine-too"
    other.mkdir()
    train(config, stopped_run, fresh=True, force=True)
    assert mine.read_text() == "keep me"
    assert other.is_dir()
    other.rmdir()
    assert fingerprint_of(stopped_run) == expected


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_that_another_process_trains_is_left_as_it_is(
    config: Path, stopped_run: Path, fresh: bool
) -> None:
    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in stopped_run.rglob("*") if p.is_file()}

    with NativePool.open(RunDirectory(stopped_run).pool, writable=True):
        before = files()
        with pytest.raises(PoolLockedError):
            train(config, stopped_run, overrides=("run.num_rounds=9",), fresh=fresh, force=fresh)
        assert files() == before
    assert train(config, stopped_run).rounds == NUM_ROUNDS


@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_that_is_not_ours_is_not_touched(
    config: Path, tmp_path: Path, fresh: bool
) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("dear reader")
    with pytest.raises(RunDirectoryError, match="not a run of quark"):
        train(config, foreign, fresh=fresh, force=fresh)
    assert [p.name for p in foreign.iterdir()] == ["chapter.tex"]


def test_what_a_run_that_died_at_its_start_left_is_taken_over(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text("")
    (run_dir / "run.json.partial").write_text("{")
    assert train(config, run_dir).rounds == NUM_ROUNDS


def test_a_setting_that_kept_a_run_from_beginning_may_be_corrected(
    config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for override in ("model.name='embedded:revews'", "pool.extra_scores=['./no.py:f']"):
        with pytest.raises(QuarkError, match=r"revews|no\.py"):
            train(config, run_dir, overrides=(override,))
    assert train(config, run_dir).rounds == NUM_ROUNDS


def test_old_checkpoints_go_and_foreign_paths_stay(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(config, run_dir, stop_at=21)
    checkpoints = RunDirectory(run_dir).checkpoints
    foreign = checkpoints / "step-of-my-own"
    foreign.mkdir()
    (checkpoints / "step-00000001.partial-0123abcd").mkdir()
    train(config, run_dir)
    names = sorted(p.name for p in checkpoints.iterdir())
    assert names == ["step-00000008", "step-00000012", "step-of-my-own"]


def test_what_a_killed_checkpoint_left_goes_before_the_next_one_needs_the_room(
    config: Path, stopped_run: Path
) -> None:
    checkpoints = RunDirectory(stopped_run).checkpoints
    before = sorted(checkpoints.iterdir())
    half_written = checkpoints / "step-00000099.partial-0123abcd"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"half")
    assert train(config, stopped_run, stop_at=1).interrupted
    assert sorted(checkpoints.iterdir()) == before


def test_a_checkpoint_holds_tensors_and_json_and_nothing_else(whole_run: Path) -> None:
    files = [p for p in RunDirectory(whole_run).checkpoints.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_the_log_never_grows_by_a_resume_without_steps(config: Path, stopped_run: Path) -> None:
    before = rows_of(stopped_run)
    assert train(config, stopped_run, stop_at=1).interrupted
    assert rows_of(stopped_run) == before


def rewrite_newest_state(run_dir: Path, part: str, changed: dict[str, Any]) -> None:
    """Change what the newest checkpoint says, with a checksum that fits."""
    checkpoint = max(RunDirectory(run_dir).checkpoints.iterdir())
    state = json.loads((checkpoint / "state.json").read_bytes())
    state[part] |= changed
    content = json.dumps(state).encode()
    (checkpoint / "state.json").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    manifest["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("bounds", [[], [0.0], [0.0] * 100])
def test_bounds_of_another_number_of_quantiles_are_refused(
    config: Path, stopped_run: Path, bounds: list[float]
) -> None:
    rewrite_newest_state(stopped_run, "position", {"previous_bounds": bounds})
    with pytest.raises(CheckpointError, match=f"has the bounds of {len(bounds)} quantiles"):
        train(config, stopped_run)


@pytest.mark.parametrize(
    ("overrides", "recorded", "reason"),
    [
        (("run.num_threads=2",), {}, "threads 1 -> 2"),
        (("run.num_rounds=4",), {}, "run.num_rounds 3 -> 4, to which the learning rate falls"),
        ((), {"torch": "1.0"}, "torch 1.0 -> "),
        ((), {"transformers": "4.0"}, "transformers 4.0 -> "),
        ((), {"device": "cuda NVIDIA"}, "device cuda NVIDIA -> cpu"),
        ((), {"instructions": "NO AVX"}, "instructions NO AVX -> "),
        ((), {"processes": "2"}, "processes 2 -> 1"),
    ],
)
def test_what_voids_exactness_is_said_and_refused_where_exactness_is_required(
    config: Path,
    stopped_run: Path,
    overrides: tuple[str, ...],
    recorded: dict[str, str],
    reason: str,
) -> None:
    rewrite_newest_state(stopped_run, "fingerprint", recorded)
    try:
        with pytest.raises(CheckpointError, match=f"--require-exact: .*\n.*{re.escape(reason)}"):
            train(config, stopped_run, overrides=overrides, require_exact=True)
        listener = Listener()
        train(config, stopped_run, overrides=overrides, listener=listener, stop_at=1)
        warnings = [m for m in listener.messages if m.startswith("warning: ")]
        assert any("not be byte-equal" in m and reason in m for m in warnings)
    finally:
        torch.set_num_threads(1)


def test_an_exact_resume_passes_where_it_is_required(
    config: Path, expected: dict[str, Any], stopped_run: Path
) -> None:
    listener = Listener()
    train(config, stopped_run, listener=listener, require_exact=True)
    assert not any("byte-equal" in message for message in listener.messages)
    assert fingerprint_of(stopped_run) == expected


def test_exactness_is_not_promised_beyond_the_cpu(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on meta an operation need not give the same bits"):
        train(config, tmp_path, overrides=("run.device=meta",), require_exact=True)


def test_upkeep_of_the_pool_leaves_a_stopped_run_as_it_was(
    config: Path, stopped_run: Path, expected: dict[str, Any]
) -> None:
    with NativePool.open(RunDirectory(stopped_run).pool, writable=True) as pool:
        assert pool.compact().num_commits > 0
    refused = quark("pool", "gc", stopped_run)
    assert refused.code == 2
    [keep] = re.findall(r"--keep (\d+)", refused.err)
    assert (
        quark("pool", "gc", RunDirectory(stopped_run).pool, "--keep", str(int(keep) - 1)).code == 2
    )
    assert quark("pool", "gc", stopped_run, "--keep", keep).code == 0
    assert not train(config, stopped_run).interrupted
    assert fingerprint_of(stopped_run)["weights"] == expected["weights"]


def test_a_snapshot_that_was_given_up_is_named(config: Path, stopped_run: Path) -> None:
    assert quark("pool", "gc", stopped_run, "--force").code == 0
    with pytest.raises(CheckpointError, match="has given up snapshot"):
        train(config, stopped_run)
