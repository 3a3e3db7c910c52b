"""Plain columns into a pool: lists, arrays, frames and data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

import quark
from quark.errors import ConfigError, DataError
from tests.tiny import byte_tokenizer

TEXTS: dict[str, Any] = {
    "prompt": ["one", "one", "two"],
    "completion": [" a", " bb", " ccc"],
    "reward": [0.5, None, float("nan")],
    "length": [2, 3, 4],
}


@pytest.fixture
def pool(tmp_path: Path) -> quark.Pool:
    return quark.Pool.create(tmp_path / "pool", tokenizer=byte_tokenizer())


class Dataset:
    """The part of ``datasets.Dataset`` that is used."""

    column_names = tuple(TEXTS)

    def to_dict(self) -> dict[str, Any]:
        return TEXTS


@pytest.mark.parametrize(
    "given",
    [
        TEXTS,
        [dict(zip(TEXTS, row, strict=True)) for row in zip(*TEXTS.values(), strict=True)],
        pl.DataFrame(TEXTS, strict=False),
        pd.DataFrame(TEXTS),
        Dataset(),
        {**TEXTS, "length": np.array([2, 3, 4]), "prompt": pd.Series(TEXTS["prompt"])},
    ],
    ids=["columns", "rows", "polars", "pandas", "datasets", "arrays"],
)
def test_every_form_makes_the_same_append(pool: quark.Pool, given: Any) -> None:
    assert pool.append(given) == range(3)
    assert pool.append(TEXTS) == range(3)  # the key is made of the content
    assert len(pool) == 3
    rows = pool.scan().collect()
    assert rows["prompt_text"].to_list() == TEXTS["prompt"]
    assert rows["completion_text"].to_list() == TEXTS["completion"]
    assert rows["completion_tokens"].list.len().to_list() == [2, 3, 4]
    assert rows["reward"].to_list() == [0.5, None, None]
    assert rows["length"].to_list() == [2.0, 3.0, 4.0]
    assert rows["prompt_id"].n_unique() == 2


def test_tokens_come_as_they_are_and_keys_are_respected(tmp_path: Path) -> None:
    with quark.Pool.create(tmp_path / "pool", vocab_size=9, store_text=False) as pool:
        ids = {"prompt_ids": np.array([[1, 2], [3, 4]]), "completion_ids": [[5], [6, 7]]}
        assert pool.append(**ids, reward=[1, 2], key="first", round=3) == range(2)
        assert pool.append(**ids, reward=[8, 9], key="first") == range(2)
        assert pool.append(**ids, reward=[8, 9]) == range(2, 4)
        first = pool.samples([0])[0]
        assert (first.round, first.prompt_tokens.tolist(), first.scores) == (
            3,
            [1, 2],
            {"reward": 1},
        )
        drawn = pool.sample(4, num_quantiles=2, seed=1)
        assert drawn["quantile"].to_list().count(1) == 2
        assert drawn.equals(pool.sample(4, num_quantiles=2, seed=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion": None}, "no column completion_text or completion_tokens"),
        ({"prompt": ["one"]}, "differ in length: prompt 1, completion 3"),
        ({"prompt": "one"}, "the column prompt is str, not a list"),
        ({"judge": ["good", "bad", "bad"]}, "row 0, column judge: good is not a number"),
        ({"prompt": ["one", 2, "two"]}, "row 1, column prompt_text: 2 is not a text"),
        ({"prompt_text": ["one"] * 3}, "name the same"),
        ({"prompt_metadata": [{}, [], {}]}, "row 1, column prompt_metadata"),
        ({"completion_tokens": [[1], [-1], [2]]}, "row 1, column completion_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_column_is_named(pool: quark.Pool, changes: dict[str, Any], message: str) -> None:
    given = {key: value for key, value in {**TEXTS, **changes}.items() if value is not None}
    with pytest.raises(DataError, match=message):
        pool.append(given)
    assert len(pool) == 0


def test_texts_without_a_tokenizer_say_what_to_pass(tmp_path: Path) -> None:
    with quark.Pool.create(tmp_path / "pool", vocab_size=9) as pool:
        with pytest.raises(DataError, match=r"pass tokenizer=.*, or a column prompt_tokens"):
            pool.append(TEXTS)
        assert pool.append(TEXTS | {"reward": [1, 2, 3]}, tokenizer=_Small()) == range(3)
        assert pool.query("SELECT MAX(reward) AS top FROM pool")["top"].to_list() == [3.0]
        assert "3 samples" in repr(pool)


class _Small:
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [len(text)] if add_special_tokens else [len(text), 8]


def test_what_training_sets_and_fits_are_asked_for_wrongly(
    pool: quark.Pool, tmp_path: Path
) -> None:
    pool.append(prompt=["p", "p"], completion=["a", "b"], reward=[0.0, 1.0])
    with pytest.raises(ConfigError, match=r"no rule 'margin'; there are: score, top"):
        pool.training_set(tmp_path / "set", "dpo", margin=1.0)
    with pytest.raises(ConfigError, match=r"say with model= which model wrote its samples"):
        pool.fit()
    with pytest.raises(ConfigError, match=r"3 is not a table of settings"):
        pool.fit(model="embedded:reviews", objective=3)
    made = pool.training_set(tmp_path / "set", "dpo")
    assert (made.num_train, made.num_test) == (1, 0)
    assert pool.explain(1).standings[0].rank == 1
