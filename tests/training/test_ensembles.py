"""A run whose reward is an ensemble: what is stored, what is ranked, and that nothing is scored twice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from quark.config.load import load_config
from quark.errors import ConfigError
from quark.pool.native import NativePool
from quark.pool.scope import Scope, values_of
from quark.pool.standards import Standards
from quark.report.load import load_run
from quark.run_directory import RunDirectory
from quark.training.explain import explain
from tests.training.tiny_run import Listener, end_of, rows_of, train, write_inputs

MEMBERS = """
from pathlib import Path

CALLS = Path(__file__).with_name("calls")

def _note(name, completions):
    with CALLS.open("a") as file:
        file.write(f"{name} {len(completions)}\\n")

def first(prompts, completions):
    _note("first", completions)
    return [sum(c < "a" for c in text) / (len(text) or 1) + 0.001 * len(text) for text in completions]

def second(prompts, completions):
    _note("second", completions)
    return [100.0 * sum(c > "a" for c in text) + 0.01 * len(text) for text in completions]

def truth(prompts, completions):
    return [float(len(set(text))) for text in completions]
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    config = write_inputs(folder)
    (folder / "members.py").write_text(MEMBERS)
    return config


def settings(config: Path, rule: str) -> tuple[str, ...]:
    file = config.parent / "members.py"
    members = json.dumps([f"{file}:first", f"{file}:second"])
    return (
        "reward.name=ensemble",
        f"reward.members={members}",
        f"pool.gold={file}:truth",
        f"combiner.rule={rule}",
        "evaluation.control_curve=false",
        "evaluation.control_gap=false",
    )


@pytest.fixture(scope="module")
def run_dir(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, ranked by the mean."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    train(config, run_dir, overrides=(*settings(config, "mean"), "run.num_rounds=2"))
    return run_dir


def test_members_gold_and_their_mean_are_columns_of_the_pool(run_dir: Path) -> None:
    with NativePool.open(RunDirectory(run_dir).pool) as pool:
        assert set(pool.score_columns) == {"reward", "member_1", "member_2", "length", "gold"}
        mean = (pool.scores("member_1") + pool.scores("member_2")) / 2
        assert pool.scores("reward") == pytest.approx(mean, rel=1e-6)
        for sample in pool.samples(range(len(pool))):
            assert sample.completion_text is not None
            assert sample.scores["gold"] == len(set(sample.completion_text))


def test_a_chunk_is_scored_once_by_each_member(config: Path, tmp_path: Path) -> None:
    calls = config.parent / "calls"
    calls.unlink(missing_ok=True)
    train(config, tmp_path / "run", overrides=(*settings(config, "worst"), "run.num_rounds=1"))
    counted = [line.split() for line in calls.read_text().splitlines()]
    evaluated = 2 * 4 * 2  # before and after, four prompts, two completions
    for name in ("first", "second"):
        total = sum(int(size) for who, size in counted if who == name)
        assert total == 24 + evaluated, name


def test_the_ranking_is_by_the_combination_on_the_scales_of_the_first_round(run_dir: Path) -> None:
    run = RunDirectory(run_dir)
    standards = Standards.read(run.standards)
    with NativePool.open(run.pool) as pool:
        first = pool.scores("member_2")[:24].astype(np.float64)
        assert standards.members["member_2"].mean == pytest.approx(first.mean())
        assert standards.members["member_2"].deviation == pytest.approx(first.std())
    [last] = [row for row in rows_of(run_dir) if row["event"] == "round"][-1:]
    config = load_config(run.config).config
    ensemble = standards.ensemble(config.combiner)
    with NativePool.open(run.pool) as pool:
        quantization = config.pool.ranking(ensemble=ensemble).quantize(pool)
        values = values_of(pool, ensemble, Scope())
        labels = quantization.labels()
        assert last["quantile_lower_bounds"] == pytest.approx(quantization.lower_bounds.tolist())
        assert values[labels == 2].min() >= values[labels == 0].max()
        gold = [pool.scores("gold")[labels == k].mean() for k in range(3)]
    assert last["gold_by_quantile"] == pytest.approx(gold)
    assert set(last["ensemble"]) == {
        "means",
        "deviations",
        "by_quantile",
        "lowest_share",
        "kendall_tau",
        "top_overlap",
    }
    evaluations = [row for row in rows_of(run_dir) if row["event"] == "evaluation"]
    assert all({"gold", "diversity"} == row["judges"].keys() for row in evaluations)
    # The report and the explanation of a sample rank alike.
    view = load_run(run_dir).pool
    assert view is not None
    assert view.labels.tolist() == labels.tolist()
    uses = explain(run_dir, 30).rounds
    assert uses[-1].quantile == labels[30]


def test_another_combiner_ranks_again_and_scores_nothing_again(config: Path, run_dir: Path) -> None:
    calls = config.parent / "calls"
    calls.unlink(missing_ok=True)
    standards = RunDirectory(run_dir).standards.read_bytes()
    listener = Listener()
    overrides = (*settings(config, "uwo"), "combiner.penalty=2")
    train(config, run_dir, overrides=(*overrides, "run.num_rounds=3"), listener=listener)
    assert any("combiner.rule mean -> uwo" in message for message in listener.messages)
    assert RunDirectory(run_dir).standards.read_bytes() == standards
    sizes = [int(line.split()[1]) for line in calls.read_text().splitlines()]
    assert sum(sizes) == 2 * (12 + 8)  # the new round's samples and its evaluation, by two members
    swapped = json.dumps(json.loads(overrides[1].removeprefix("reward.members="))[::-1])
    overrides = (*overrides, f"reward.members={swapped}", "run.num_rounds=3")
    with pytest.raises(ConfigError, match=re.escape("reward.members")):
        train(config, run_dir, overrides=overrides)


def test_a_stopped_run_ranks_by_the_same_scales(config: Path, tmp_path: Path) -> None:
    overrides = (*settings(config, "robust"), "run.num_rounds=2")
    train(config, tmp_path / "whole", overrides=overrides)
    while train(config, tmp_path / "run", overrides=overrides, stop_at=9).interrupted:
        pass
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("reward.name=ensemble",), "belong together"),
        (('reward.members=["vader"]',), "belong together"),
        (("reward.name=ensemble", 'reward.members=["ensemble"]'), "cannot be an ensemble"),
        (("combiner.rule=median",), "combiner.rule"),
    ],
)
def test_settings_of_an_ensemble_that_do_not_fit_are_refused(
    config: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(config, overrides)
