"""What `quark evaluate` measures is what the run measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quark.run_directory import RunDirectory
from tests.cli.commands import TINY_RUN, quark

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
    "adapters": ["model.lora.rank=2", "optimizer.learning_rate=1e-2"],
}


def measured_by_the_run(run_dir: Path) -> dict[int | None, Mapping[str, Any]]:
    """The last evaluation of each quantile, and that of the original model."""
    rows = map(json.loads, RunDirectory(run_dir).metrics.read_text().splitlines())
    return {row["quantile"]: row for row in rows if row["event"] == "evaluation"}


@pytest.mark.parametrize("name", RUNS)
def test_evaluate_says_what_the_run_said_to_the_bit(name: str, tmp_path: Path) -> None:
    if name == "adapters":
        pytest.importorskip("peft")
    run_dir, reward = tmp_path / "run", tmp_path / "rewards.py"
    reward.write_text(FLAKY)
    settings = [part for setting in RUNS[name] for part in ("--set", setting)]
    # Code is not taken from a run directory: reward and judges are named again.
    named = [f"{reward}:flaky", "vader"] if name == "retries" else []
    if named:
        settings += ["--set", f"reward.name={named[0]}"]
    trained = quark("train", "--run-dir", run_dir, *TINY_RUN, *settings, "--json")
    assert trained.code == 0, trained.err
    expected = measured_by_the_run(run_dir)
    assert all(row["failed_scores"] == 0 for row in expected.values())

    outcome = quark("evaluate", run_dir, "--json", *(p for n in named for p in ("--reward", n)))
    assert outcome.code == 0, outcome.err
    found = {e["quantile"]: e for e in outcome.json["evaluations"]}
    assert found.keys() == expected.keys() == {None, 0, 1, 2, 3, 4}
    for quantile, figures in found.items():
        assert figures == {key: expected[quantile][key] for key in figures}, quantile
    assert outcome.json["control_curve"] == trained.json["control_curve"]
    assert found[4]["kl_policy_to_reference"] == trained.json["kl_policy_to_reference"] > 0.0


def test_merged_adapters_are_measured_where_the_checkpoints_are_gone(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run_dir = tmp_path / "run"
    settings = ("--set", "model.lora.rank=2", "--set", "optimizer.learning_rate=1e-2")
    assert quark("train", "--run-dir", run_dir, *TINY_RUN, *settings).code == 0
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
