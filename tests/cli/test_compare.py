"""`quark compare`: runs, checkpoints and plain models on the same prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quark.run_directory import RunDirectory
from tests.cli.commands import Outcome, quark
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def checkpoint(run_dir: Path) -> Path:
    return max(RunDirectory(run_dir).checkpoints.iterdir())


@pytest.fixture(scope="module")
def compared(run_dir: Path, checkpoint: Path) -> Outcome:
    models = (f"{run_dir}", f"{run_dir}@0", checkpoint, "embedded:reviews")
    return quark(
        "compare", *models, "--num", "2", "--reward", "sentiment", "--reward", "vader", "--json"
    )


def values(compared: Outcome) -> list[dict[str, Any]]:
    return [
        {name: figure["value"] for name, figure in model["figures"].items()}
        for model in compared.json["models"]
    ]


def test_a_checkpoint_of_the_end_is_the_run_and_a_plain_model_has_no_drift(
    compared: Outcome,
) -> None:
    assert compared.code == 0, compared.err
    run, worst, checkpoint, original = values(compared)
    assert checkpoint == run
    assert worst["reward"] != run["reward"]
    assert run["kl_sampled"] > 0.0
    assert original["kl_sampled"] == original["kl_policy_to_reference"] == 0.0


def test_figures_are_those_of_evaluate(compared: Outcome, run_dir: Path) -> None:
    wishes = ("--num", "2", "--reward", "sentiment", "--reward", "vader", "--json")
    evaluated = quark("evaluate", run_dir, "-q", "best", "-q", "none", *wishes)
    assert evaluated.code == 0, evaluated.err
    expected = [
        {name: figure["value"] for name, figure in found["figures"].items()}
        for found in evaluated.json["figures"]
    ]
    run, _, _, original = values(compared)
    assert run == expected[0]
    assert original == pytest.approx(expected[1], rel=1e-9, abs=1e-9, nan_ok=True)
    assert evaluated.json["conditioning"] is None


def test_differences_are_paired_with_the_first_model(compared: Outcome) -> None:
    run, worst, _, _ = values(compared)
    difference, of_the_same, _ = compared.json["differences"]
    found = difference["figures"]["reward"]
    assert found["value"] == pytest.approx(worst["reward"] - run["reward"])
    assert found["low"] <= found["value"] <= found["high"]
    assert of_the_same["figures"]["reward"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_the_scorers_are_named_with_their_hashes(compared: Outcome) -> None:
    scorers = compared.json["scorers"]
    assert len(scorers["sentiment"]["sha256"]) == 64
    assert compared.json["completions_per_prompt"] == 2


def test_a_model_of_another_vocabulary_has_no_drift(tmp_path: Path) -> None:
    other, prompts = save_tiny(tmp_path / "other"), tmp_path / "prompts.jsonl"
    prompts.write_text(
        json.dumps({"prompt": "The camera"}) + "\n" + json.dumps({"prompt": "It"}) + "\n"
    )
    options = ("--prompts", prompts, "--max-new-tokens", "4")
    outcome = quark("compare", "embedded:reviews", other, *options, "--json")
    assert outcome.code == 0, outcome.err
    assert "another vocabulary" in outcome.err
    first, second = values(outcome)
    assert second["kl_sampled"] is second["perplexity"] is None
    assert first["perplexity"] > 1.0
    assert second["reward"] > 0.0
    people = quark("compare", "embedded:reviews", other, *options)
    assert "minus the first" in people.out
    markdown = quark("compare", "embedded:reviews", other, *options, "--markdown").out
    assert "| kl_sampled | ↓ |" in markdown
    assert "| maximum" not in markdown


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (("{run}", "{run}"), "is given twice"),
        (("{run}@9",), "--quantile 9"),
        (("{run}@none",), "to compare with the original model, name that model"),
        (("{run}/checkpoints/nothing",), "there is no model at"),
    ],
)
def test_a_model_that_cannot_be_compared_is_named(
    run_dir: Path, models: tuple[str, ...], said: str
) -> None:
    outcome = quark("compare", *(model.format(run=run_dir) for model in models))
    assert outcome.code in (2, 3, 4)
    assert said in " ".join(outcome.err.split())
