from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quark.pool.ties import repeated_share, tie_share


@pytest.mark.parametrize(
    ("scores", "labels", "share"),
    [
        ([], [], 0.0),
        ([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1], 0.0),
        # Equal scores in one quantile toss no coin.
        ([1.0, 1.0, 2.0, 2.0], [0, 0, 1, 1], 0.0),
        ([1.0, 2.0, 2.0, 3.0], [0, 0, 1, 1], 0.5),
        ([1.0, 1.0, 1.0, 1.0], [0, 1, 0, 1], 1.0),
        ([-np.inf, -np.inf, np.inf, np.inf], [0, 1, 1, 1], 0.5),
        ([0.0, -0.0], [0, 1], 1.0),
        # What is not ranked counts on neither side.
        ([1.0, 2.0, 2.0, np.nan, 2.0], [0, 0, 1, -1, -1], 2 / 3),
        ([np.nan], [-1], 0.0),
    ],
)
def test_the_share_of_samples_whose_quantile_the_tie_rule_chose(scores, labels, share):
    found = tie_share(np.array(scores, dtype=np.float32), np.array(labels, dtype=np.int16))
    assert found == pytest.approx(share)


def test_scores_of_different_prompts_do_not_tie_where_each_is_ranked_for_itself():
    scores = np.array([1.0, 1.0, 1.0, 2.0], dtype=np.float32)
    labels = np.array([0, 1, 0, 1], dtype=np.int16)
    apart, paired = np.array([0, 1, 2, 2], np.uint32), np.array([0, 0, 2, 2], np.uint32)
    assert tie_share(scores, labels) == 0.75
    assert tie_share(scores, labels, apart) == 0.0
    assert tie_share(scores, labels, paired) == 0.5


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 3), st.integers(0, 2)), max_size=30))
def test_the_share_is_that_of_a_plain_count(rows):
    ranked = [row for row in rows if row[1] >= 0]
    tied = [
        (score, label, prompt)
        for score, label, prompt in ranked
        if len({other for value, other, of in ranked if (value, of) == (score, prompt)}) > 1
    ]
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    found = tie_share(
        columns[0].astype(np.float32), columns[1].astype(np.int16), columns[2].astype(np.uint32)
    )
    assert found == pytest.approx(len(tied) / max(len(ranked), 1))


def test_the_share_of_scores_that_occur_more_than_once():
    assert repeated_share(np.array([1.0, 1.0, 2.0, np.nan], dtype=np.float32)) == pytest.approx(
        2 / 3
    )
    assert repeated_share(np.array([np.nan], dtype=np.float32)) == 0.0
