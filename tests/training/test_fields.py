"""A reward that asks for fields of the prompts' rows: from the first round to a re-scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quark
from quark.cli.exit_codes import ExitCode
from quark.config.load import load_config
from quark.errors import DataError
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.dry_run import dry_run
from tests.api.small import SMALL
from tests.cli.commands import quark as command
from tests.tiny import save_tiny
from tests.training.tiny_run import Listener, end_of, train, write_inputs

REWARD = """
def scored(prompts, completions, answer):
    return [a + 0.001 * len(text) for a, text in zip(answer, completions)]

def doubled(*, prompts, completions, answer, tags=None, **others):
    assert set(others) <= {"note"}
    return [2 * a + len(t or []) for a, t in zip(answer, tags)]

def needy(*, prompts, completions, solution):
    raise AssertionError("nothing is scored")
"""
ROWS: list[dict[str, Any]] = [
    # Cut to the last tokens, so that texts are equal, while each row has its own answer.
    *({"prompt": f"{word} say it", "answer": 10 + n} for n, word in enumerate(["one", "two"] * 4)),
    {"prompt": "tagged", "answer": 30, "tags": ["x", "y"], "note": {"by": "us"}},
    *({"prompt": f"ask {n}", "answer": 40 + n, "split": "eval"} for n in range(4)),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fields")
    config = write_inputs(folder)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tiny_reward.py").write_text(REWARD)
    text = config.read_text().replace(":low_bytes", ":scored")
    config.write_text(text.replace("num_evaluation = 4", "num_evaluation = 4\nmax_tokens = 6"))
    return config


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(config, folder)
    return RunDirectory(folder)


def samples_of(run: RunDirectory) -> list[Any]:
    with NativePool.open(run.pool) as pool:
        return pool.samples(range(len(pool)))


def test_each_completion_is_scored_by_the_answer_of_its_own_row(run: RunDirectory) -> None:
    answers: dict[str, set[int]] = {}
    for sample in samples_of(run):
        row = json.loads(sample.prompt_metadata)
        expected = row["answer"] + 0.001 * len(sample.completion_text)
        assert sample.scores["reward"] == np.float32(expected)
        answers.setdefault(sample.prompt_text, set()).add(row["answer"])
        if row["answer"] == 30:
            assert row == {"answer": 30, "tags": ["x", "y"], "note": {"by": "us"}}
    assert answers == {"say it": set(range(10, 18)), "tagged": {30}}


def test_a_resumed_run_ends_with_the_same_bytes(
    config: Path, run: RunDirectory, tmp_path: Path
) -> None:
    train(config, tmp_path / "run", stop_at=9)
    train(config, tmp_path / "run")
    assert end_of(tmp_path / "run") == end_of(run.path)


def test_a_run_is_not_resumed_with_other_answers(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run", stop_at=9)
    prompts = config.parent / "prompts.jsonl"
    before = prompts.read_text()
    try:
        prompts.write_text(before.replace('"answer": 17', '"answer": 18'))
        with pytest.raises(DataError, match="have other fields than when"):
            train(config, tmp_path / "run")
    finally:
        prompts.write_text(before)


def test_held_out_completions_are_scored_by_their_rows(config: Path, run: RunDirectory) -> None:
    allowed = [
        config.parent / name for name in ("model", "tiny_reward.py:scored", "tiny_reward.py")
    ]
    outcome = command(
        "evaluate", run.path, "--json", *(part for name in allowed for part in ("--allow", name))
    )
    assert outcome.code == 0, outcome.err
    assert 41.5 <= outcome.json["evaluations"][0]["reward_mean"] < 41.6


def test_a_re_scoring_has_the_fields_from_the_pool_alone(
    config: Path, run: RunDirectory, tmp_path: Path
) -> None:
    copy = tmp_path / "pool"
    assert command("pool", "fork", run.path, copy).code == 0
    script = config.parent / "tiny_reward.py"
    refused = command("pool", "rescore", copy, f"{script}:needy", "--as", "second")
    assert refused.code == ExitCode.INPUT
    assert "prompt 0: no field 'solution', which the reward needy asks for" in " ".join(
        refused.err.split()
    )
    outcome = command("pool", "rescore", copy, f"{script}:doubled", "--chunk-size", "5")
    assert outcome.code == 0, outcome.err
    with NativePool.open(copy) as pool:
        assert set(pool.score_columns) == {"reward", "length"}
        for sample in pool.samples(range(len(pool))):
            row = json.loads(sample.prompt_metadata)
            assert sample.scores["reward"] == 2 * row["answer"] + len(row.get("tags", []))


@pytest.mark.parametrize("setting", ["reward.name", "evaluation.judges", "pool.extra_scores"])
def test_a_row_without_the_field_stops_the_start(
    setting: str, config: Path, tmp_path: Path
) -> None:
    name = f"{config.parent / 'tiny_reward.py'}:needy"
    value = name if setting == "reward.name" else json.dumps([name])
    loaded = load_config(config, [f"{setting}={value}"])
    line = 10 if setting == "evaluation.judges" else 1
    reason = rf"prompts.jsonl:{line}: no field 'solution', which the reward needy asks for"
    with pytest.raises(DataError, match=reason):
        dry_run(loaded, listener=Listener())
    with pytest.raises(DataError, match=reason):
        train(loaded, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_function_of_python_asks_for_a_column(tmp_path: Path) -> None:
    prompts = [{"prompt": f"say {n}", "answer": str(n)} for n in range(12)]
    asked: list[Any] = []

    def exact(*, prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        asked.extend(zip(prompts, answer, strict=True))
        return [float(wanted in text) for text, wanted in zip(completions, answer, strict=True)]

    run = quark.train(
        None,
        model=save_tiny(tmp_path / "model"),
        prompts=prompts,
        reward=exact,
        run_dir=tmp_path / "run",
        **SMALL | {"num_rounds": 1},
    )
    assert run.path.exists()
    assert len({prompt for prompt, _ in asked}) == 11
    assert all(prompt == f"say {answer}" for prompt, answer in asked)


def test_reward_check_reads_the_fields_of_its_samples(config: Path, tmp_path: Path) -> None:
    name = f"{config.parent / 'tiny_reward.py'}:scored"
    refused = command("reward", "check", name)
    assert refused.code == ExitCode.INPUT
    assert "asks for answer" in " ".join(refused.err.split())
    samples = tmp_path / "samples.jsonl"
    rows = [{"prompt": "p", "completion": "c", "answer": n} for n in range(3)]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = command("reward", "check", name, "--samples", samples, "--json")
    assert outcome.code == 0, outcome.err
    assert [round(sample["score"], 3) for sample in outcome.json["scores"]] == [0.001, 1.001, 2.001]
    samples.write_text(samples.read_text() + '{"completion": "c"}\n')
    refused = command("reward", "check", name, "--samples", samples)
    assert refused.code == ExitCode.INPUT
    assert "samples.jsonl:4: no field 'answer'" in " ".join(refused.err.split())
