"""What `quark evaluate` measures is what the run measured."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from tests.cli.commands import TINY_RUN, quark, trained_run

FLAKY = """
calls = 0


def flaky(*, prompts, completions):
    global calls
    calls += 1
    if calls % 2:
        raise ConnectionError("every other call is lost")
    return [len(text) / 100 for text in completions]
"""

RUNS = {
    "plain": ["evaluation.completions_per_prompt=3", 'evaluation.judges=["vader"]'],
    "retries": ["reward.retries=1"],
    "bfloat16": ["run.precision=bfloat16"],
    "bfloat16 weights": ["model.dtype=bfloat16"],
    "guidance": ["sampling.guidance=2.0", "evaluation.top_p=0.9"],
    "critic": ["sampling.guide=critic", "sampling.guidance=2.0"],
    "adapters and critic": [
        "model.lora.rank=2",
        "optimizer.learning_rate=1e-2",
        "sampling.guide=critic",
        "sampling.guidance=2.0",
    ],
    "adapters": ["model.lora.rank=2", "optimizer.learning_rate=1e-2"],
}


def measured_by_the_run(run_dir: Path) -> dict[int | None, Mapping[str, Any]]:
    """The last evaluation of each quantile, and that of the original model."""
    rows = map(json.loads, RunDirectory(run_dir).metrics.read_text().splitlines())
    return {row["quantile"]: row for row in rows if row["event"] == "evaluation"}


@pytest.mark.parametrize("name", RUNS)
def test_evaluate_says_what_the_run_said_to_the_bit(name: str, tmp_path: Path) -> None:
    if name.startswith("adapters"):
        pytest.importorskip("peft")
    run_dir, reward = tmp_path / "run", tmp_path / "rewards.py"
    reward.write_text(FLAKY)
    settings = [*RUNS[name]]
    # Code is not taken from a run directory: reward and judges are named again.
    named = [f"{reward}:flaky", "vader"] if name == "retries" else []
    if named:
        settings.append(f"reward.name={named[0]}")
    trained = trained_run(run_dir, *settings)
    expected = measured_by_the_run(run_dir)
    assert all(row["failed_scores"] == 0 for row in expected.values())

    outcome = quark("evaluate", run_dir, "--json", *(p for n in named for p in ("--reward", n)))
    assert outcome.code == 0, outcome.err
    found = {e["quantile"]: e for e in outcome.json["evaluations"]}
    assert found.keys() == expected.keys() == {None, 0, 1, 2, 3, 4}
    for quantile, figures in found.items():
        assert figures == {key: expected[quantile][key] for key in figures}, quantile
    assert outcome.json["control_curve"] == list(trained.control_curve)
    assert found[4]["kl_policy_to_reference"] == trained.kl_policy_to_reference > 0.0
    if name == "critic":
        last = quark("evaluate", run_dir, "-q", "best", "--checkpoint", "last", "--json")
        assert last.json["evaluations"] == [outcome.json["evaluations"][-1]], last.err
        # The critic tells the tokens apart, whether or not the model listens to them.
        assert outcome.json["conditioning"] is None
        curve = quark("frontier", run_dir, "--json").json["points"]
        assert [p["guidance"] for p in curve if p["quantile"] == 4] == [0, 1, 2, 3, 4, 6]
        assert curve[-1]["drift"]["mean"] > curve[-2]["drift"]["mean"] > curve[-5]["drift"]["mean"]


def test_merged_adapters_are_measured_where_the_checkpoints_are_gone(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run_dir = tmp_path / "run"
    trained_run(run_dir, "model.lora.rank=2", "optimizer.learning_rate=1e-2")
    exact = quark("evaluate", run_dir, "-q", "best", "--json")
    assert "merged" not in exact.err
    shutil.rmtree(RunDirectory(run_dir).checkpoints)
    merged = quark("evaluate", run_dir, "-q", "best", "--json")
    assert "no checkpoint has this model's adapters" in merged.err
    (before,), (after,) = exact.json["evaluations"], merged.json["evaluations"]
    assert after["kl_policy_to_reference"] == pytest.approx(
        before["kl_policy_to_reference"], rel=1e-3
    )


def test_the_seed_draws_other_completions_of_the_same_prompts(run_dir: Path) -> None:
    same, other = (
        quark("evaluate", run_dir, "-q", "none", "--seed", seed, "--json") for seed in ("0", "1")
    )
    assert same.json["evaluations"] != other.json["evaluations"]


ASKED = """
import json


def asked(*, prompts, completions):
    with open({path!r}, "a") as file:
        file.write("".join(json.dumps(prompt) + chr(10) for prompt in prompts))
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def own_run(tmp_path: Path) -> tuple[Path, Path]:
    """A run on prompts of one's own, of which a seeded part is held out, and the file of prompts."""
    file, run_dir = tmp_path / "prompts.txt", tmp_path / "run"
    file.write_text("".join(f"the thing number {i}\n" for i in range(30)))
    settings = ("--set", f"prompts.source={file}", "--set", "run.seed=5")
    assert quark("train", "--run-dir", run_dir, *TINY_RUN, *settings).code == 0
    return run_dir, file


def evaluated(run_dir: Path, *options: str) -> tuple[list[str], Any, str]:
    """The prompts that one evaluation is about, its figures, and what it says."""
    path, reward = run_dir.parent / "asked.jsonl", run_dir.parent / "asked.py"
    path.unlink(missing_ok=True)
    reward.write_text(ASKED.format(path=str(path)))
    command = ("evaluate", run_dir, "-q", "best", "-n", "1", "--reward", f"{reward}:asked")
    outcome = quark(*command, *options, "--json")
    assert outcome.code == 0, outcome.err
    prompts = [json.loads(line) for line in path.read_text().splitlines()]
    return prompts, outcome.json["evaluations"], outcome.err


def test_only_prompts_that_the_run_held_out_are_measured(own_run: tuple[Path, Path]) -> None:
    run_dir, file = own_run
    with NativePool.open(RunDirectory(run_dir).pool) as pool:
        trained = {sample.prompt_text for sample in pool.samples(range(len(pool)))}
    prompts, figures, said = evaluated(run_dir)
    assert len(set(prompts)) == 8
    assert trained.isdisjoint(prompts)
    assert "warning" not in said
    for seed in ("1", "2"):
        again, others, _ = evaluated(run_dir, "--seed", seed)
        assert again == prompts
        assert others != figures

    file.write_text("".join(f"something else {i}\n" for i in range(30)))
    again, unchanged, said = evaluated(run_dir)
    assert (again, unchanged) == (prompts, figures)
    assert f"{file} has changed since the run began" in said
    file.unlink()
    assert evaluated(run_dir)[:2] == (prompts, figures)


def test_a_run_without_a_record_is_split_again_by_its_own_seed(own_run: tuple[Path, Path]) -> None:
    run_dir, file = own_run
    prompts, figures, _ = evaluated(run_dir)
    RunDirectory(run_dir).held_out.unlink()
    again, unchanged, said = evaluated(run_dir)
    assert (again, unchanged) == (prompts, figures)
    assert "does not record its held-out prompts" in said
    assert "other prompts than it held out" not in said
    assert evaluated(run_dir, "--seed", "1")[0] == prompts
    file.write_text("".join(f"the thing number {i}\n" for i in range(29)))
    assert "other prompts than it held out" in evaluated(run_dir)[2]


@pytest.mark.parametrize("damage", ["", "[]\n", '{"prompt": "a"}\n', "{"])
def test_a_damaged_record_of_held_out_prompts_is_named(
    run_dir: Path, tmp_path: Path, damage: str
) -> None:
    copy = RunDirectory(shutil.copytree(run_dir, tmp_path / "copy"))
    copy.held_out.write_text(damage)
    refused = quark("evaluate", copy.path)
    assert refused.code == 4
    assert "held_out.jsonl" in refused.err
    assert "--prompts" in refused.err


def test_the_record_of_a_stranger_leads_nowhere(run_dir: Path, tmp_path: Path) -> None:
    copy = RunDirectory(shutil.copytree(run_dir, tmp_path / "copy"))
    secret, pipe = tmp_path / "secret.jsonl", tmp_path / "pipe"
    shutil.copy(copy.held_out, secret)
    os.mkfifo(pipe)
    rows = [json.loads(line) for line in copy.held_out.read_text().splitlines()]
    copy.held_out.write_text(
        "".join(json.dumps(row | {"source": str(pipe)}) + "\n" for row in rows)
    )
    followed = quark("evaluate", copy.path, "-q", "none", "--json")
    assert followed.code == 0, followed.err
    assert "has changed" not in followed.err, "a file that nobody allowed was looked at"
    copy.held_out.unlink()
    copy.held_out.symlink_to(secret)
    assert quark("evaluate", copy.path, "-q", "none").code == 4


def test_the_record_is_a_prompt_file(run_dir: Path) -> None:
    record = RunDirectory(run_dir).held_out
    assert len(record.read_text().splitlines()) == 8
    by_itself, named = (
        quark("evaluate", run_dir, "-q", "best", *options, "--json")
        for options in ((), ("--prompts", record))
    )
    assert by_itself.json["evaluations"] == named.json["evaluations"]


@pytest.mark.parametrize("token", [2048, 999_999, 10**30], ids=["reward token", "beyond", "huge"])
def test_a_recorded_token_that_is_none_of_the_models_is_refused_with_the_way_out(
    run_dir: Path, tmp_path: Path, token: int
) -> None:
    run = RunDirectory(shutil.copytree(run_dir, tmp_path / "run"))
    rows = [json.loads(line) for line in run.held_out.read_text().splitlines()]
    rows[1]["token_ids"] = [5, token]
    run.held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (("evaluate",), ("compare",), ("frontier", "--guidance", "1")):
        outcome = quark(command[0], run.path, *command[1:])
        assert outcome.code == 4, outcome.err
        assert f"{run.held_out}:2 is damaged or belongs to another model" in outcome.err
        assert "--prompts" in outcome.err


def test_a_strength_that_is_none_is_blamed_on_the_file_that_says_it(
    run_dir: Path, tmp_path: Path
) -> None:
    run = RunDirectory(shutil.copytree(run_dir, tmp_path / "run"))
    said = {"format_version": 1, "reward": "x", "num_prompts": 3, "points": []}
    for changed in ({"picked": math.nan}, {"picked": -3}, {"picked": 1e300}, {"num_prompts": -1}):
        run.frontier.write_text(json.dumps({"picked": 1.0} | said | changed))
        outcome = quark("generate", run.path, "-p", "a", "--max-new-tokens", "2")
        assert outcome.code == 4, outcome.err
        assert f"{run.frontier} is damaged" in outcome.err
