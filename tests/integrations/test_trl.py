"""TRL's rollouts are in the pool before TRL goes on, and a run that continues scores none of them again."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quark.errors import ConfigError
from quark.integrations.trl import PoolRewards
from quark.pool.native import NativePool
from tests.cli.commands import ROOT
from tests.interchange.foreign_files import ids
from tests.tiny import byte_tokenizer

TEXTS = ["one", "two", "two", "four"]


class Calls:
    """Two reward functions that note what they are asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def length(self, *, completions: list[str], answer: list[int], **_: Any) -> list[float]:
        self.asked.append(("length", completions))
        return [len(text) + answer[at] / 10 for at, text in enumerate(completions)]

    async def style(self, *, completions: list[str], **_: Any) -> list[float | None]:
        self.asked.append(("style", completions))
        return [None if text == "four" else 0.5 for text in completions]


def ask(rewards: PoolRewards, texts: list[str], *, step: int) -> list[list[float | None]]:
    """As TRL does: each function in turn, with the same objects."""
    arguments = {
        "prompts": [f"p{at // 2}" for at in range(len(texts))],
        "completions": texts,
        "completion_ids": [[*ids(text), 256] for text in texts],
        "answer": list(range(len(texts))),
        "trainer_state": SimpleNamespace(global_step=step),
        "log_extra": print,
    }
    return [function(**arguments) for function in rewards]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[functools.partial[PoolRewards]]:
    made: list[PoolRewards] = []

    def make(calls: Calls, **options: Any) -> PoolRewards:
        for rewards in made:
            rewards.sink.close()
        rewards = PoolRewards(
            [calls.length, calls.style],
            pool=tmp_path / "pool",
            tokenizer=byte_tokenizer(),
            **options,
        )
        made.append(rewards)
        return rewards

    yield functools.partial(make)
    for rewards in made:
        rewards.sink.close()


def test_every_rollout_is_committed_with_all_that_trl_says(opened: Any, tmp_path: Path) -> None:
    calls = Calls()
    rewards = opened(calls, weights=[1.0, 2.0])
    assert [function.__name__ for function in rewards] == ["length", "style"]
    lengths, styles = ask(rewards, TEXTS, step=3)
    assert lengths == pytest.approx([3.0, 3.1, 3.2, 4.3])
    assert styles == [0.5, 0.5, 0.5, None]
    assert [name for name, _ in calls.asked] == ["length", "style"], "each is called once"
    with NativePool.open(tmp_path / "pool") as pool:
        rows = pool.scan().collect().to_dicts()
    assert [row["completion_text"] for row in rows] == TEXTS, "equal ones, too"
    assert rows[0]["completion_tokens"] == [*ids("one"), 256]
    assert rows[0]["prompt_tokens"] == ids("p0")
    assert [row["reward"] for row in rows] == pytest.approx([4.0, 4.1, 4.2, 4.3])
    assert rows[3]["style"] is None
    assert {row["round"] for row in rows} == {3}
    assert [row["finish_reason"] for row in rows] == [1] * 4
    assert json.loads(rows[0]["prompt_metadata"]) == {"answer": 0}
    assert json.loads(rows[0]["settings"])["sink"]["trainer"] == "trl"


def test_a_replay_answers_from_the_pool_and_scores_only_what_is_new(
    opened: Any, tmp_path: Path
) -> None:
    first = ask(opened(Calls()), TEXTS, step=3)
    calls = Calls()
    rewards = opened(calls, resume="replay")
    again = ask(rewards, TEXTS, step=3)
    assert again[0] == pytest.approx(first[0])
    assert again[1] == first[1]
    assert calls.asked == []
    grown = ask(rewards, [*TEXTS, "more"], step=4)
    assert calls.asked[0] == ("length", [*TEXTS, "more"]), "another step is other rollouts"
    assert len(grown[0]) == 5
    calls = Calls()
    rewards = opened(calls, resume="replay")
    ask(rewards, ["one", "new", "two", "four"], step=3)
    assert calls.asked == [("length", ["new"]), ("style", ["new"])]
    assert len(rewards.sink) == 4 + 5 + 1
    calls = Calls()
    rewards = opened(calls)
    ask(rewards, TEXTS, step=3)
    assert [texts for _, texts in calls.asked] == [TEXTS, TEXTS], "without replay all are asked"
    assert len(rewards.sink) == 10, "and nothing is stored twice"


def test_values_that_a_pool_does_not_keep_stop_no_training(tmp_path: Path) -> None:
    def huge(*, completions: list[str], **_: Any) -> list[float]:
        return [1e39] * len(completions)

    def low(*, completions: list[str], **_: Any) -> list[float]:
        return [-1e39] * len(completions)

    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    columns = {"half": "\ud800", "digits": 10**400, "nan": math.nan, "deep": deep, "fine": "é"}
    rewards = PoolRewards([huge, low], pool=tmp_path / "pool", tokenizer=byte_tokenizer())
    batch = {"prompts": ["p"], "completions": ["c"], "completion_ids": [ids("c")]}
    for function in rewards:
        function(**batch, **{name: [value] for name, value in columns.items()})
    rewards.sink.close()
    with NativePool.open(tmp_path / "pool") as pool:
        [row] = pool.scan().collect().to_dicts()
    assert json.loads(row["prompt_metadata"]) == {"fine": "é"}
    assert (row["huge"], row["low"]) == (math.inf, -math.inf)


def test_a_failed_reward_commits_nothing(tmp_path: Path) -> None:
    def broken(**_: Any) -> list[float]:
        raise RuntimeError("no")

    def short(**_: Any) -> list[float]:
        return [1.0]

    for function, error in ((broken, RuntimeError), (short, ValueError)):
        rewards = PoolRewards(
            function, pool=tmp_path / function.__name__, tokenizer=byte_tokenizer()
        )
        with pytest.raises(error):
            ask(rewards, TEXTS, step=1)
        assert len(rewards.sink) == 0


def test_what_cannot_be_wrapped_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(**_: Any) -> list[float]:
        return []

    arguments = {"pool": tmp_path / "pool", "tokenizer": byte_tokenizer()}
    with pytest.raises(ConfigError, match="two reward functions have the name 'score'"):
        PoolRewards([score, score], **arguments)
    with pytest.raises(ConfigError, match="str is not a function"):
        PoolRewards(["org/model"], **arguments)
    with pytest.raises(ConfigError, match="1 weights for 2 functions"):
        PoolRewards([score, print], weights=[1.0], **arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert PoolRewards(score, **arguments).sink.path == tmp_path / "pool.1"


def grpo(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.integrations.grpo", str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "hf")},
        check=False,
    )


def scored(folder: Path) -> Counter[str]:
    """How often each rollout was scored."""
    lines = (folder / "scored.jsonl").read_text().splitlines()
    return Counter(json.dumps(json.loads(line)) for line in lines)


def committed(folder: Path) -> Counter[str]:
    """How often each rollout is in the pool."""
    with NativePool.open(folder / "pool") as pool:
        rows = pool.scan().select("round", "prompt_text", "completion_tokens").collect()
    return Counter(json.dumps(list(row)) for row in rows.iter_rows())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_grpo_is_killed_and_scores_no_rollout_twice(tmp_path: Path) -> None:
    killed = grpo(tmp_path, 4, 2)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    before = committed(tmp_path)
    assert before == scored(tmp_path), "all that was scored is there"
    assert {json.loads(row)[0] for row in before} == {0, 1}
    done = grpo(tmp_path, 4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "done").exists()
    after = committed(tmp_path)
    assert after == scored(tmp_path), "and nothing was scored that the pool had"
    assert before <= after
    assert sum(after.values()) == 4 * 4, "the killed step gave the same rollouts again"
