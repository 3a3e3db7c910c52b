"""`quark overopt`: from tables, pools and logs to curves, advice and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from quark.evaluation.overoptimization import CurvePoint, best_of_n, training_curve
from quark.pool.native import NativePool
from quark.report.overopt import Conditioned, Overopt, found_in, prompts_of_pool, prompts_of_table
from quark.report.overopt_chart import picture
from quark.selftest.samples import VOCAB_SIZE, make_batch
from tests.cli.commands import quark


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Thirty prompts with 32 samples each, whose gold reward is highest at a moderate proxy; shuffled."""
    random = np.random.default_rng(2)
    rows: list[dict[str, object]] = [
        {"prompt": f"p{prompt}", "reward": proxy, "gold": -((proxy - 1) ** 2)}
        for prompt in range(30)
        for proxy in random.normal(size=32)
    ]
    rows.append({"prompt": "alone", "reward": 1.0, "gold": None})
    random.shuffle(rows)  # type: ignore[arg-type]
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gold_keeps_to_its_sample_in_whatever_order_a_table_comes(table: Path) -> None:
    prompts, left_out = prompts_of_table(table, proxy="reward", gold="gold")
    assert (len(prompts), left_out) == (30, 1)
    for proxy, gold in prompts:
        assert gold == pytest.approx(-((proxy - 1) ** 2))
        assert best_of_n(proxy, gold, 32) == pytest.approx(-((proxy.max() - 1) ** 2))


def test_the_command_tells_that_best_of_n_is_past_its_peak(table: Path, tmp_path: Path) -> None:
    drawing = tmp_path / "overopt.svg"
    done = quark("overopt", str(table), "--json", "--picture", str(drawing))
    assert done.code == 0, done.err
    said = done.json
    assert [point["label"] for point in said["best_of_n"]["points"]] == [1, 2, 4, 8, 16]
    assert said["best_of_n"]["fit"]["is_extrapolated"] is False
    assert said["training"] is None
    assert "past its peak" in said["advice"][0]
    assert drawing.read_text().lstrip().startswith("<?xml")
    assert "best of n" in quark("overopt", str(table)).out


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"reward": 1, "gold": 1}', "'prompt'"),
        ('{"prompt": "a", "gold": 1}', "no field 'reward'"),
        ('{"prompt": "a", "reward": "high", "gold": 1}', "must be a number"),
        ("{", "scored.jsonl:1"),
        ('{"prompt": "a", "reward": 1, "gold": 1}', "no prompt has 4 samples"),
    ],
)
def test_a_table_that_has_no_curve_says_why(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "scored.jsonl"
    path.write_text(row + "\n")
    done = quark("overopt", str(path))
    assert done.code != 0
    assert said in " ".join(done.err.split())


def test_only_samples_of_the_original_model_count(tmp_path: Path) -> None:
    with NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE) as pool:
        for round, token in ((0, -1), (1, 4)):
            scores = {
                "reward": [float(i) for i in range(24)],
                "gold": [float(-i) if round else float(i) for i in range(24)],
            }
            batch = make_batch(f"run/{round}/0", scores, content=7)
            tokens = np.full(24, token, dtype=np.int16)
            pool.append(dataclasses.replace(batch, round=round, reward_tokens=tokens))
        prompts, left_out = prompts_of_pool(pool, proxy="reward", gold="gold")
    assert len(prompts) + left_out == 3
    assert all((proxy == gold).all() for proxy, gold in prompts)
    done = quark("overopt", str(tmp_path / "pool"), "--gold", "people")
    assert done.code != 0
    assert "'people'" in done.err
    assert "quark pool rescore" in " ".join(done.err.split())


def found(golds: list[float], *, tokens: list[float] | None = None) -> Overopt:
    points = [
        CurvePoint(label=10 * i, kl=d * d, distance=d, proxy=d, gold=gold, effective=math.nan)
        for i, (d, gold) in enumerate(
            zip(np.linspace(0.5, 3, len(golds)).tolist(), golds, strict=True), 1
        )
    ]
    conditioning = tuple(
        Conditioned(quantile=k, proxy=float(k), gold=gold) for k, gold in enumerate(tokens or [])
    )
    return found_in([], 0, (training_curve(points, 0.0, num_resamples=50), conditioning, None))


def test_the_advice_names_the_checkpoint_to_keep() -> None:
    rising = found([0.2, 0.4, 0.6, 0.8, 1.0])
    assert "step 50" in rising.advice[0]
    assert "training on may still help" in rising.advice[0]
    falling = found([0.4, 0.7, 0.8, 0.6, 0.2, -0.2])
    assert "past its peak: keep the checkpoint of step 30" in falling.advice[0]


def test_a_best_token_that_fools_the_reward_is_told() -> None:
    assert len(found([0.1, 0.2, 0.3, 0.4], tokens=[0.0, 0.3, 0.5]).advice) == 1
    said = found([0.1, 0.2, 0.3, 0.4], tokens=[0.0, 0.5, 0.3]).advice[1]
    assert "higher from quantile 1" in said
    assert "conditioning" in picture(found([0.1, 0.2, 0.3, 0.4], tokens=[0.0, 0.5]))
