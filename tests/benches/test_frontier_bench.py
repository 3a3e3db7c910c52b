"""`benches/frontier.py`: the concave hull that its tables read rewards from, and what its runs are given."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))

from reward_drift.contenders import BUDGETS, NEWEST_ROUND, NUM_PROMPTS, QUARK, RAFT, Contender
from reward_drift.runs import child
from reward_drift.tables import hull_height, tables
from reward_drift.task import Point, Task, tuning_prompts

from quark.config.load import load_config


def point(drift: float, reward: float, **other: object) -> Point:
    values = {
        "method": "quark",
        "settings": "",
        "seed": 0,
        "samples": 512,
        "guidance": 0.0,
        "kl_per_token": 0.1,
        "distinct_2": 0.8,
        "length": 9.0,
        "perplexity": 20.0,
        "cpu_seconds": 1.0,
        "peak_mib": 1.0,
    }
    return Point(**values | {"kl_per_completion": drift, "reward": reward} | other)


UNIT = st.floats(0.0, 1.0, allow_subnormal=False)
POINTS = st.lists(st.tuples(st.floats(0.01, 10.0), UNIT), min_size=1, max_size=8)


@given(pairs=POINTS, drifts=st.tuples(st.floats(0, 12), st.floats(0, 12)), weight=UNIT)
def test_the_hull_is_concave_and_lies_on_or_above_every_point(
    pairs: list[tuple[float, float]], drifts: tuple[float, float], weight: float
) -> None:
    points = [point(*pair) for pair in pairs]

    def height(drift: float) -> float:
        return float(hull_height(points, drift, base=0.4))

    for drift, reward in pairs:
        assert height(drift) >= reward - 1e-9
    assert height(0.0) == pytest.approx(0.4)
    a, b = drifts
    mixed = weight * a + (1 - weight) * b
    assert height(mixed) >= weight * height(a) + (1 - weight) * height(b) - 1e-9
    assert height(20.0) == pytest.approx(max(0.4, *(reward for _, reward in pairs)))


def test_a_swept_method_counts_with_its_best_settings_in_the_mean_over_seeds() -> None:
    points = [
        point(2.0, 0.9, method="GRPO", settings="a", seed=0),
        point(2.0, 0.5, method="GRPO", settings="a", seed=1),
        point(2.0, 0.8, method="GRPO", settings="b", seed=0),
        point(2.0, 0.8, method="GRPO", settings="b", seed=1),
    ]
    lines = list(tables(points, 0.4))
    row = next(line for line in lines if line.startswith("| GRPO"))
    assert row.split(" | ")[1] == "0.800 ± 0.000"


def test_every_contender_of_ours_is_a_valid_configuration(tmp_path: Path) -> None:
    for contender in (*QUARK, *NEWEST_ROUND, RAFT):
        task = Task(
            contender=contender,
            seed=3,
            budgets=(256,),
            guidance=(0.0,),
            base=(),
            is_tuning=True,
        )
        config = load_config("demo", task.overrides(tmp_path)).config
        first = config.run.prompts_first_round * config.run.completions_per_prompt
        later = config.run.prompts_per_round * config.run.completions_per_prompt
        for budget in BUDGETS:
            assert (budget - first) % later == 0, contender.method


def test_tuning_prompts_are_training_prompts_apart() -> None:
    train, held_out = tuning_prompts()
    texts = {row["prompt"] for row in train}
    assert len(held_out) == NUM_PROMPTS
    assert not texts & {row["prompt"] for row in held_out}


@pytest.mark.parametrize("contender", [QUARK[0], Contender(method="best-of-n", kind="best-of-n")])
def test_a_run_is_measured_at_its_budget(contender: Contender) -> None:
    small = (
        "run.completions_per_prompt=1",
        "run.prompts_first_round=8",
        "run.steps_per_round=1",
        "optimizer.batch_size=8",
        "prompts.num_evaluation=4",
        "sampling.max_new_tokens=4",
    )
    task = Task(
        contender=dataclasses.replace(contender, settings=(*contender.settings, *small)),
        seed=0,
        budgets=(8,),
        guidance=(0.0, 0.5),
        base=(),
        is_tuning=False,
    )
    points = child(task)
    measured = [(p.samples, p.guidance) for p in points]
    if contender.kind == "quark":
        assert measured == [(8, 0.0), (8, 0.5)]
        assert all(p.kl_per_completion > 0.0 for p in points)
    else:
        assert measured == [(2**i, 0.0) for i in range(7)]
    assert all(0.0 <= p.reward <= 1.0 for p in points)
