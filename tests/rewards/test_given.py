"""Rewards that are objects: what they may be, and by what their code is known."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
from typing import Any

import pytest

from quark.errors import RewardError
from quark.rewards.build import build_reward, reward_content
from quark.rewards.code_identity import code_content
from quark.rewards.config import RewardConfig
from quark.rewards.given import GivenReward
from quark.rewards.heuristics import LengthConfig, LengthReward

ASK: dict[str, Any] = {"prompts": ["a"], "completions": ["bcd"]}


def made(source: str, name: str = "reward") -> Any:
    """What ``source`` defines, as it would in a notebook: there is no file of it."""
    module = types.ModuleType("__main__")
    exec(source, module.__dict__)
    return vars(module)[name]


def length(*, prompts: list[str], completions: list[str], scale: float = 1.0) -> list[float]:
    return [scale * len(text) for text in completions]


class Scaled:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, *, prompts: list[str], completions: list[str]) -> list[float]:
        return [self.scale * len(text) for text in completions]


async def later(prompts: list[str], completions: list[str]) -> list[float]:
    return [4.0]


@pytest.mark.parametrize(
    ("target", "name", "score"),
    [
        (length, "length", 3.0),
        (lambda completions, **_: [9.0], "<lambda>", 9.0),
        (Scaled(2.0), "Scaled", 6.0),
        (Scaled, "Scaled", 3.0),
        (functools.partial(length, scale=5.0), "partial", 15.0),
        (Scaled(3.0).__call__, "__call__", 9.0),
        (later, "later", 4.0),
        (LengthReward(LengthConfig(target=3, unit="characters")), "length", 1.0),
    ],
    ids=["function", "lambda", "object", "class", "partial", "method", "async", "built-in"],
)
def test_anything_that_can_be_called_is_a_reward(target: Any, name: str, score: float) -> None:
    reward = GivenReward(target)
    assert reward.name == name
    assert list(reward(**ASK)) == [score]
    config = RewardConfig(name=reward.setting)
    assert build_reward(config, reward).name == name
    assert list(build_reward(config.model_copy(update={"timeout_s": 9.0}), reward)(**ASK)) == [
        score
    ]


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(RewardError, match="is int, not a function"):
        GivenReward(3)
    with pytest.raises(RewardError, match="cannot be called as function"):
        GivenReward(lambda texts: [])
    with pytest.raises(RewardError, match="Pass an object instead of the class"):
        GivenReward(type("Needy", (), {"__init__": lambda self, x: None}))
    with pytest.raises(RewardError, match="passed in Python, and no file holds it"):
        build_reward(RewardConfig(name="python:length"))


BASE = """
LIMIT = 7
def helper(text):
    return min(len(text), LIMIT)
def reward(*, prompts, completions):
    return [helper(text) for text in completions]
"""


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (("LIMIT = 7", "LIMIT = 8"), {"helper"}),
        (("min(", "max("), {"helper"}),
        (("[helper(text)", "[1 + helper(text)"), {"reward"}),
        (("return [helper", "# a comment\n    return [helper"), set()),
    ],
    ids=["constant", "helper", "body", "comment"],
)
def test_code_is_known_by_its_content(change: tuple[str, str], changed: set[str]) -> None:
    before, after = code_content(made(BASE)), code_content(made(BASE.replace(*change)))
    assert before.keys() == after.keys() == {"reward", "helper"}
    assert {name for name in before if before[name] != after[name]} == changed


def test_values_that_an_object_or_a_closure_holds_count() -> None:
    def scaled(scale: float) -> Any:
        return lambda *, prompts, completions: [scale for _ in completions]

    assert code_content(scaled(1.0)) == code_content(scaled(1.0)) != code_content(scaled(2.0))
    assert code_content(Scaled(1.0)) == code_content(Scaled(1.0)) != code_content(Scaled(2.0))
    halves = [functools.partial(length, scale=scale) for scale in (0.5, 0.5, 0.25)]
    assert code_content(halves[0]) == code_content(halves[1]) != code_content(halves[2])
    assert reward_content(GivenReward(length)) == code_content(length)


def test_two_processes_agree_about_code_that_has_no_file() -> None:
    code = (
        "from quark.rewards.code_identity import code_content\n"
        "f = lambda *, prompts, completions: [text in {'a', 'b', 'c'} for text in completions]\n"
        "print(code_content(f))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
