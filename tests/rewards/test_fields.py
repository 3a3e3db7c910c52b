"""Rewards that ask for fields of the prompts' rows, by the names of their parameters."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quark.errors import DataError, RewardError
from quark.rewards.build import build_reward
from quark.rewards.config import RewardConfig
from quark.rewards.fields import fields_asked, require_fields
from quark.rewards.given import GivenReward
from quark.rewards.scoring import score

PROMPTS, COMPLETIONS = ["p", "p", "q"], ["a", "b", "c"]
ROWS: list[dict[str, Any]] = [
    {"answer": "a", "n": 1, "tags": ["x"], "completions": "not these"},
    {"answer": "a", "n": 2, "tags": []},
    {"answer": "c", "n": None},
]


def exact(*, prompts, completions, answer):
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def optional(completions, prompts, hint=None, *, scale=1.0):
    assert isinstance(scale, float)
    return [float(h is not None) for h in hint]


def everything(completions, **fields):
    assert fields.keys() == {"prompts", "answer", "n", "tags"}
    return [float(len(fields)) for _ in completions]


class Judge:
    name = "judge"

    def __call__(self, *, prompts, completions, n, answer=None):
        return [10.0 * number + (a is not None) for number, a in zip(n, answer, strict=True)]


async def later(completions, answer, **_):
    return [float(len(text)) for text in answer]


@pytest.mark.parametrize(
    ("target", "scores"),
    [
        (exact, [1, 0, 1]),
        (functools.partial(optional, scale=2.0), [0, 0, 0]),
        (optional, [0, 0, 0]),
        (everything, [4, 4, 4]),
        (lambda prompts, completions, *, scale=2.0, **_: [scale for _ in prompts], [2, 2, 2]),
        (later, [1, 1, 1]),
        (lambda completions, prompts, tags=None: [len(t or "four") for t in tags], [1, 4, 4]),
    ],
    ids=["required", "bound", "no such field", "all", "all but a setting", "async", "nested"],
)
def test_a_reward_gets_the_fields_that_it_asks_for(target: Any, scores: list[float]) -> None:
    outcome = score(GivenReward(target), PROMPTS, COMPLETIONS, rows=ROWS, batch_size=2)
    assert outcome.scores.tolist() == scores


def test_fields_keep_to_their_rows_in_every_batch() -> None:
    """The texts of the first two rows are the same; their answers are not."""
    rows = [{"answer": answer} for answer in "xyx"]
    texts = ["x", "x", "y"]
    for size in (1, 2, 3):
        outcome = score(GivenReward(exact), ["p"] * 3, texts, rows=rows, batch_size=size)
        assert outcome.scores.tolist() == [1, 0, 0]


def test_a_reward_that_changes_what_it_gets_changes_no_row() -> None:
    def greedy(completions, prompts, tags):
        tags[0].append("mine")
        return [float(len(tag)) for tag in tags]

    row: dict[str, Any] = {"tags": ["x"]}
    for _ in range(2):
        assert score(GivenReward(greedy), ["p"], ["c"], rows=[row]).scores.tolist() == [2]
    assert row == {"tags": ["x"]}


def test_a_missing_field_is_said_before_anything_is_scored() -> None:
    calls: list[int] = []

    def counting(completions, prompts, answer):
        calls.append(len(completions))
        return [0.0 for _ in completions]

    reward = GivenReward(counting)
    rows = [{"answer": "a"}, {"question": "?"}, {"answer": None, "id": 3}]
    places = [f"prompts.jsonl:{number}" for number in (1, 2, 3)]
    with pytest.raises(
        DataError, match=r"^prompts.jsonl:2: no field 'answer', which the reward coun.*question"
    ):
        require_fields(reward, zip(places, rows, strict=True))
    with pytest.raises(DataError, match=r"jsonl:3: no value in the field 'answer'.*1 of 1 rows"):
        require_fields(reward, [(places[2], rows[2])])
    for mode in ("fail", "nan"):
        with pytest.raises(RewardError, match="the row of prompt 1 has no value"):
            score(reward, PROMPTS, COMPLETIONS, rows=rows, batch_size=1, on_error=mode)
        with pytest.raises(RewardError, match="asks for the field 'answer'"):
            score(reward, PROMPTS, COMPLETIONS, on_error=mode)
    assert not calls


def test_a_field_that_is_named_like_a_setting_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"^f:2: the row has a field 'scale', and the reward optional"
    ):
        require_fields(GivenReward(optional), [("f:1", {}), ("f:2", {"scale": 3})])
    outcome = score(GivenReward(optional), ["p"], ["c"], rows=[{"scale": 3}])
    assert outcome.scores.tolist() == [0]


def test_what_is_around_a_reward_passes_its_fields_on(tmp_path: Path) -> None:
    """A time limit, one minus the score, and an ensemble, whose members each get what they ask for."""
    (tmp_path / "mine.py").write_text(
        "def exact(*, prompts, completions, answer):\n"
        "    return [float(t == a) for t, a in zip(completions, answer)]\n"
        "def number(*, prompts, completions, n):\n"
        "    return [float(value) for value in n]\n"
    )
    exact_name, number_name = (f"{tmp_path / 'mine.py'}:{name}" for name in ("exact", "number"))
    rows = [{**row, "n": number} for number, row in enumerate(ROWS)]

    def scores(**settings: Any) -> list[float]:
        reward = build_reward(RewardConfig(**settings))
        return score(reward, PROMPTS, COMPLETIONS, rows=rows).scores.tolist()

    assert scores(name=exact_name) == [1, 0, 1]
    assert scores(name=exact_name, timeout_s=30.0, complement=True) == [0, 1, 0]
    members = (exact_name, number_name, "length")
    assert scores(name="ensemble", members=members) == pytest.approx([2 / 3, 2 / 3, 4 / 3])


def test_an_ensemble_does_not_mix_rows_of_the_same_texts(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def number(*, prompts, completions, n):\n    return [float(value) for value in n]\n"
    )
    config = RewardConfig(name="ensemble", members=(f"{tmp_path / 'mine.py'}:number", "length"))
    ensemble: Any = build_reward(config)
    assert fields_asked(ensemble).required == {"n"}
    for n in (1, 2):
        assert score(ensemble, ["p"], ["c"], rows=[{"n": n}]).scores.tolist() == [(n + 1) / 2]
    for n in (2, 1, 7):  # the last one was never scored by the whole ensemble
        for member, expected in zip(ensemble.members, (n, 1), strict=True):
            assert score(member, ["p"], ["c"], rows=[{"n": n}]).scores.tolist() == [expected]


def test_an_object_of_quark_passed_from_python_asks_for_what_is_inside() -> None:
    inside = GivenReward(Judge())
    assert fields_asked(GivenReward(inside)) == fields_asked(inside)
    outcome = score(GivenReward(inside), PROMPTS, COMPLETIONS, rows=[{"n": 1}] * 3)
    assert outcome.scores.tolist() == [10, 10, 10]
    outcome = score(GivenReward(inside), PROMPTS, COMPLETIONS, rows=[{"n": 1, "answer": 1}] * 3)
    np.testing.assert_array_equal(outcome.scores, [11, 11, 11])
