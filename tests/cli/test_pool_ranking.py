"""Training, the report and the commands put every sample of a run into the same quantile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quark.config.load import load_config
from quark.pool.native import NativePool
from quark.pool.standards import Standards
from quark.pool.ties import tie_share
from quark.report.load import load_run
from quark.run_directory import RunDirectory
from quark.training.explain import explain
from quark.training.loop.draws import quantize
from quark.view.sources import Answers, Filter, sources_of
from tests.cli.commands import quark, trained_run

RULES = {
    "defaults": [],
    "per prompt": ["pool.per_prompt=true", "run.completions_per_prompt=4"],
    "together": ["pool.ties=together"],
    "older first": ["pool.ties=older_first"],
    "lowest": ["pool.remainder=lowest", "pool.num_quantiles=7"],
    "where": ["pool.where=logprob_reference < -10 OR round = 1"],
    "min score": ["pool.min_score=2"],
    "max per round": ["pool.max_per_round=15"],
    "last rounds": ["pool.last_rounds=1"],
    "several": [
        "pool.last_rounds=2",
        "pool.where=reward > 0",
        "pool.ties=together",
        "pool.max_per_round=18",
    ],
    "ensemble": [
        "reward.name=ensemble",
        'reward.members=["{folder}/coarse.py:coarse", "{folder}/coarse.py:other"]',
        "combiner.rule=worst",
    ],
}


@pytest.mark.parametrize("settings", RULES.values(), ids=RULES.keys())
def test_a_run_has_one_ranking_wherever_it_is_shown(tmp_path: Path, settings: list[str]) -> None:
    reward = tmp_path / "coarse.py"
    reward.write_text(
        "def coarse(*, prompts, completions):\n    return [float(len(text) % 5) for text in completions]\n"
        "def other(*, prompts, completions):\n    return [-9.0 * text.count('e') for text in completions]\n"
    )
    path = tmp_path / "run"
    trained_run(
        path,
        f"reward.name={reward}:coarse",
        *(setting.replace("{folder}", str(tmp_path)) for setting in settings),
    )

    directory = RunDirectory(path)
    config = load_config(directory.config).config
    ensemble = (
        Standards.read(directory.standards).ensemble(config.combiner)
        if config.reward.members
        else None
    )
    rules = config.pool.ranking(ensemble=ensemble)
    with NativePool.open(directory.pool) as pool:
        trained = quantize(pool, rules)
        labels, values = trained.labels(), rules.values(pool)
        tied = tie_share(values, labels, pool.column("prompt_id") if rules.per_prompt else None)
        plain = pool.quantize(5).labels()
    assert np.array_equal(labels, plain) == (not settings)
    assert len(np.unique(labels[labels >= 0])) > 1

    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    logged = [row for row in rows if row["event"] == "round"][-1]
    assert logged["quantile_counts"] == trained.counts.tolist()
    assert logged["tie_share"] == tied

    shown = load_run(path).pool
    assert shown is not None
    np.testing.assert_array_equal(shown.labels, labels)
    assert [view.num_samples for view in shown.quantiles] == trained.counts.tolist()

    def said(*arguments: str) -> Any:
        outcome = quark("pool", arguments[0], path, *arguments[1:], "--json")
        assert outcome.code == 0, outcome.err
        return outcome.json

    head = said("head", "--num", str(len(labels)))["samples"]
    assert [sample["quantile"] for sample in head] == labels.tolist()
    stats = said("stats")
    assert stats["quantile_counts"] == trained.counts.tolist()
    assert stats["tie_share"] == tied
    for bounds in (stats["quantile_lower_bounds"], logged["quantile_lower_bounds"]):
        numbers = np.array(bounds, dtype=np.float32)  # null is NaN: the bound of an empty quantile
        np.testing.assert_array_equal(numbers, trained.lower_bounds)
    answers = Answers(sources_of([path]))
    assert answers.sources()[0]["quantiles"] == rules.num_quantiles  # type: ignore[index, call-overload]
    for quantile in range(rules.num_quantiles):
        page = answers.samples(0, Filter(quantile=quantile))
        assert page["total"] == trained.counts[quantile]
        assert {row["id"] for row in page["rows"]} <= set(np.flatnonzero(labels == quantile))  # type: ignore[index, call-overload, union-attr]
    if ensemble is not None:
        assert stats["score"] == "ensemble"
        by_column = said("stats", "--score", "reward")
        assert by_column["score"] == "reward"
        assert by_column["quantile_lower_bounds"] != stats["quantile_lower_bounds"]
        return  # what follows is of the column
    for sample in range(0, len(labels), 7):
        (standing,) = (each for each in explain(path, sample).standings if each.column == "reward")
        assert standing.quantile == labels[sample]
        (last,) = (use for use in explain(path, sample).rounds if use.round == 1)
        assert last.quantile == labels[sample]
    assert said("explain", "3")["scores"]["reward"]["quantile"] == labels[3]
