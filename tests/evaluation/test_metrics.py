from __future__ import annotations

import math

import numpy as np
import pytest

from quark.evaluation.metrics import any_above, expected_maximum, text_metrics


def test_distinct_n_counts_over_all_texts() -> None:
    figures = text_metrics(["a b a", "a b"])
    assert figures["distinct_1"] == pytest.approx(2 / 5)
    assert figures["distinct_2"] == pytest.approx(2 / 3)
    assert figures["distinct_3"] == 1.0


def test_per_prompt_figures_divide_by_words() -> None:
    figures = text_metrics(["a b", "a b", "a b", "c d"], group_size=2)
    assert figures["distinct_2_per_prompt"] == pytest.approx((1 / 4 + 2 / 4) / 2)


def test_expected_maximum_and_probability_of_the_toxicity_literature() -> None:
    scores = np.array([0.1, 0.6, 0.2, 0.3, 0.5, np.nan], dtype=np.float32)
    assert expected_maximum(scores, 2) == pytest.approx((0.6 + 0.3 + 0.5) / 3)
    assert any_above(scores, 2, threshold=0.5) == pytest.approx(1 / 3)


def test_a_prompt_without_any_score_does_not_count() -> None:
    scores = np.array([np.nan, np.nan, 0.2, 0.4], dtype=np.float32)
    assert expected_maximum(scores, 2) == pytest.approx(0.4)
    assert math.isnan(expected_maximum(np.full(2, np.nan, dtype=np.float32), 2))
