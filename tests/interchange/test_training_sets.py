"""Training sets hold what their rules say, and the tools that they are for read them."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from quark.errors import ConfigError
from quark.interchange.training_sets import SetKind, SetRules, export_training_set
from quark.pool.base import PromptRecord, SampleBatch
from quark.pool.native import NativePool
from tests.cli.commands import ROOT, quark
from tests.interchange.foreign_files import ids

Row = tuple[str, str, float]
"""Prompt, completion, score."""


def make_pool(path: Path, rows: Sequence[Row], *, model: str = "evil|<b>\x1b[2J") -> NativePool:
    pool = NativePool.create(path, vocab_size=257, metadata={"model": model})
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in rows))
    tokens = [np.array(ids(completion), np.uint32) for _, completion, _ in rows]
    nothing = np.full(len(rows), np.nan, np.float32)
    pool.append(
        SampleBatch(
            key="k",
            prompts=[
                PromptRecord(token_ids=np.array(ids(prompt), np.uint32), text=prompt)
                for prompt in prompts
            ],
            prompt_index=np.array([prompts.index(prompt) for prompt, _, _ in rows], np.uint32),
            completion_tokens=np.concatenate(tokens),
            completion_offsets=np.cumsum([0, *map(len, tokens)]),
            completion_texts=[completion for _, completion, _ in rows],
            finish_reasons=np.ones(len(rows), np.uint8),
            round=0,
            chunk=0,
            policy_step=0,
            reward_tokens=np.full(len(rows), -1, np.int16),
            settings="{}",
            seeds=np.arange(len(rows), dtype=np.uint64),
            logprob_policy=nothing,
            logprob_reference=nothing,
            logprob_sampled=nothing,
            scores={"reward": np.array([score for _, _, score in rows], np.float32)},
        )
    )
    return pool


ROWS: list[Row] = [
    *(
        (f"p{prompt}", f"c{rank}", rank / 8 + prompt / 100)
        for prompt in range(5)
        for rank in range(8)
    ),
    ("p0", "c7", 0.0),
    ("p0", "unscored", math.nan),
    ("p0", "beyond", math.inf),
]


@pytest.fixture
def pool(tmp_path: Path) -> NativePool:
    return make_pool(tmp_path / "pool", ROWS)


def made(pool: NativePool, folder: Path, kind: SetKind, **rules: object) -> pl.DataFrame:
    export_training_set(pool, folder, kind, SetRules(**rules))  # type: ignore[arg-type]
    return pl.read_parquet(folder / "train.parquet")


def test_the_best_samples_for_supervised_training(pool: NativePool, tmp_path: Path) -> None:
    rows = made(pool, tmp_path / "sft", SetKind.SFT, top=0.25)
    assert rows.columns == ["prompt", "completion"]
    assert set(rows["completion"]) == {"c6", "c7"}
    assert rows.height == 10, "a quarter of 40: the repeated and unscored ones do not count"
    few = made(pool, tmp_path / "few", SetKind.SFT, top=0.5, max_per_prompt=1)
    assert few.sort("prompt").rows() == [(f"p{n}", "c7") for n in range(5)]


def test_labels_of_equal_scores_are_equal(tmp_path: Path) -> None:
    rows = [("p", f"c{n}", float(n % 2)) for n in range(10)]
    kto = made(make_pool(tmp_path / "pool", rows), tmp_path / "kto", SetKind.KTO, top=0.2)
    assert kto.columns == ["prompt", "completion", "label"]
    assert kto.group_by("label").len().sort("label").rows() == [(False, 5), (True, 5)]
    assert set(kto.filter("label")["completion"]) == {f"c{n}" for n in range(1, 10, 2)}


def test_the_best_and_the_worst_for_kto(pool: NativePool, tmp_path: Path) -> None:
    rows = made(pool, tmp_path / "kto", SetKind.KTO, top=0.125, bottom=0.125, max_per_prompt=1)
    assert rows.sort("prompt", "label").rows() == [
        row for n in range(5) for row in ((f"p{n}", "c0", False), (f"p{n}", "c7", True))
    ]


def test_pairs_lie_within_a_prompt_and_keep_their_margin(pool: NativePool, tmp_path: Path) -> None:
    rows = made(pool, tmp_path / "dpo", SetKind.DPO, min_margin=0.5)
    assert rows.columns == ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
    assert set(rows.select("chosen", "rejected").rows()) == {("c7", "c0"), ("c6", "c1")}
    assert rows.height == 10
    margins = rows["score_chosen"] - rows["score_rejected"]
    assert margins.min() >= 0.5
    one = made(pool, tmp_path / "reward", SetKind.REWARD, max_per_prompt=1)
    assert one.columns == ["prompt", "chosen", "rejected", "margin"]
    assert set(one.select("chosen", "rejected").rows()) == {("c7", "c0")}
    assert one.height == 5
    equal = make_pool(tmp_path / "equal", [("p", f"c{n}", 1.0) for n in range(4)])
    with pytest.raises(ConfigError, match=r"no pair of .* fits the rules: 4 samples"):
        made(equal, tmp_path / "none", SetKind.DPO)
    assert not (tmp_path / "none").exists()


def test_no_prompt_is_in_both_splits(tmp_path: Path) -> None:
    rows = [(f"prompt {n}", f"c{m}", float(m)) for n in range(60) for m in range(4)]
    pool = make_pool(tmp_path / "pool", rows)
    result = export_training_set(
        pool, tmp_path / "a", SetKind.DPO, SetRules(test_share=0.25, seed=3)
    )
    train, test = (
        pl.read_parquet(tmp_path / "a" / f"{name}.parquet") for name in ("train", "test")
    )
    assert not set(train["prompt"]) & set(test["prompt"])
    assert (train.height, test.height) == (result.num_train, result.num_test)
    assert 12 <= test.height <= 48
    export_training_set(pool, tmp_path / "b", SetKind.SFT, SetRules(test_share=0.25, seed=3))
    again = pl.read_parquet(tmp_path / "b" / "test.parquet")
    assert set(again["prompt"]) == set(test["prompt"]), "a prompt stays on its side"


def test_the_card_says_how_the_set_was_made(pool: NativePool, tmp_path: Path) -> None:
    made(pool, tmp_path / "kto", SetKind.KTO, top=0.25, where="reward < 2 AND round = 0")
    card = (tmp_path / "kto" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nconfigs:\n- config_name: default\n")
    assert "| positive | the top 0.25 of the samples: 0.75 or more |" in card
    assert "| condition | reward &lt; 2 AND round = 0 |" in card
    assert "1 repeated |" in card
    assert "\x1b" not in card
    assert "evil\\|&lt;b>" in card


def test_nothing_but_a_training_set_is_replaced(pool: NativePool, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for place in (mine, mine / "thesis.txt"):
        refused = quark("pool", "export", pool.path, place, "--as", "sft", "--force")
        assert refused.code == 2
        assert "is no training set, and --force replaces nothing else" in refused.err
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_text_of_a_pool_is_no_markup_in_the_card(tmp_path: Path) -> None:
    model = "![](https://host/seen.png) [x](javascript:1) `**"
    pool = make_pool(tmp_path / "pool", ROWS, model=model)
    made(pool, tmp_path / "set", SetKind.SFT)
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert r"!\[\](https://host/seen.png) \[x\](javascript:1) \`\*\*" in card


def test_the_command(pool: NativePool, tmp_path: Path) -> None:
    path = pool.path
    out = tmp_path / "pairs"
    told = quark("pool", "export", path, out, "--as", "dpo", "--min-margin", "0.5", "--json")
    assert told.code == 0, told.err
    assert (told.json["train"], told.json["test"], told.json["prompts"]) == (10, 0, 5)
    assert quark("pool", "export", path, out, "--as", "dpo").code == 2
    assert "wrote" in quark("pool", "export", path, out, "--as", "sft", "--force").out
    for arguments, reason in (
        (("--top", "0.5"), "--top belongs to --as sft|kto"),
        (("--as", "dpo", "--top", "0.5"), "--top does not belong to --as dpo"),
        (("--as", "ppo"), "--as is one of sft, dpo, kto, reward"),
        (("--as", "sft", "--top", "1.5"), "--top is 1.5; it must be above 0"),
        (("--as", "sft", "--score", "nope"), "no score column 'nope' (it has: reward)"),
        (("--as", "sft", "--where", "nope > 1"), "nope"),
    ):
        refused = quark("pool", "export", path, tmp_path / "other", *arguments)
        assert refused.code == 2, refused.err
        assert reason in " ".join(refused.err.split())
        assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl_trains_a_step_on_every_set(pool: NativePool, tmp_path: Path) -> None:
    for kind in (SetKind.SFT, SetKind.DPO, SetKind.KTO):
        export_training_set(pool, tmp_path / kind, kind, SetRules(test_share=0.3))
    done = subprocess.run(
        [sys.executable, "-m", "tests.interchange.trl_steps", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("sft", "dpo", "kto"):
        assert (tmp_path / f"steps-{name}").read_text() == "1"
