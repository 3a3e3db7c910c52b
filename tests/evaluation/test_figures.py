"""Every figure of an evaluation against a case computed by hand, its interval, and paired differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quark.evaluation.figures import (
    Figure,
    figures_of,
    likelihood_figures,
    mean,
    score_figures,
    text_figures,
)
from quark.evaluation.metrics import Direction
from tests.evaluation.test_evaluator import evaluate


def named(figures: object) -> dict[str, float]:
    return {figure.name: figure.value for figure in figures}  # type: ignore[attr-defined]


def test_scores_of_a_reward() -> None:
    scores = np.array([0.1, 0.6, 0.9, 0.7, np.nan, 0.5, np.nan, np.nan], dtype=np.float32)
    found = named(score_figures(scores, 2, name="praise", scorer="sentiment"))
    assert found["praise"] == pytest.approx((0.1 + 0.6 + 0.9 + 0.7 + 0.5) / 5)
    assert found["praise_above_half"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)  # 0.5 is not above
    assert found["praise_minimum"] == pytest.approx((0.1 + 0.7 + 0.5) / 3)
    assert found["praise_below_half"] == pytest.approx(1 / 3)  # 0.5 is not below
    assert "maximum_toxicity" not in found


def test_toxicity_as_the_literature_reports_it() -> None:
    toxicity = np.array([[0.2, 0.6, 0.1], [0.5, 0.3, 0.4]])
    found = named(score_figures((1 - toxicity).ravel(), 3, name="reward", scorer="toxicity"))
    assert found["maximum_toxicity"] == pytest.approx((0.6 + 0.5) / 2)
    assert found["toxicity_probability"] == pytest.approx(1 / 2)


def test_scores_that_are_all_missing_are_not_a_number() -> None:
    found = named(score_figures(np.full(4, np.nan), 2, name="reward", scorer="toxicity"))
    assert all(math.isnan(value) for value in found.values())


def test_texts_by_hand() -> None:
    found = named(text_figures([["a b", "a b"], ["a b c", "d d d d"]]))
    assert found["distinct_1"] == pytest.approx((2 / 4 + 4 / 7) / 2)
    assert found["distinct_2"] == pytest.approx((1 / 2 + 3 / 5) / 2)
    assert found["distinct_2_words"] == pytest.approx((1 / 4 + 3 / 7) / 2)
    assert found["distinct_3"] == pytest.approx(2 / 3)  # the first prompt has no trigram
    assert found["distinct_3_words"] == pytest.approx((0 / 4 + 2 / 7) / 2)
    assert found["self_bleu"] == pytest.approx((1.0 + 0.0) / 2)
    assert found["repetition_2"] == pytest.approx((0 + 0 + 0 + 2 / 3) / 4)
    assert found["diversity"] == pytest.approx((3 + 1 / 3 * 1 / 2 * 1) / 4)
    assert found["corpus_repetition_2"] == pytest.approx(1 - 5 / 7)
    assert found["corpus_diversity"] == pytest.approx(5 / 7 * 2 / 3 * 1)
    # Without each text's last n-gram: bigrams (a b) | (d d) (d d), trigrams (d d d).
    assert found["corpus_diversity_simctg"] == pytest.approx(2 / 3)
    assert found["words"] == pytest.approx(11 / 4)


def test_empty_and_one_word_completions_have_documented_values() -> None:
    found = named(text_figures([["", "one"], ["", ""]]))
    assert found["distinct_1"] == 1.0
    assert math.isnan(found["distinct_2"])
    assert found["distinct_2_words"] == 0.0
    assert found["self_bleu"] == 0.0
    assert found["diversity"] == found["corpus_diversity"] == 1.0
    assert found["repetition_4"] == found["corpus_repetition_4"] == 0.0
    alone = named(text_figures([["a b"], ["c"]]))
    assert math.isnan(alone["self_bleu"])


def test_perplexity_in_three_ways_and_drift() -> None:
    nll, lengths = np.array([2.0, 9.0, 40.0, 1.0]), np.array([1.0, 3.0, 2.0, 4.0])
    sums = {
        "reference_nll": nll,
        "drift": np.array([1.0, 2.0, 3.0, 4.0]),
        "kl_policy_to_reference": np.array([1.0, 1.0, 2.0, 0.0]),
        "kl_reference_to_policy": np.array([0.5, 0.5, 0.0, 0.0]),
    }
    found = named(likelihood_figures(sums, lengths, 2))
    assert found["perplexity"] == pytest.approx(math.exp(52 / 10))
    assert found["perplexity_texts"] == pytest.approx(math.exp((2 + 3 + 20 + 0.25) / 4))
    capped = math.exp(2) + math.exp(3) + 1e4 + math.exp(0.25)
    assert found["perplexity_mean"] == pytest.approx(capped / 4)
    assert found["kl_policy_to_reference"] == pytest.approx(4 / 10)
    assert found["kl_reference_to_policy"] == pytest.approx(1 / 10)
    assert found["kl_sampled"] == pytest.approx(10 / 4)
    assert found["tokens"] == pytest.approx(10 / 4)


def figure(values: list[float]) -> Figure:
    return mean("figure", Direction.HIGHER, np.array(values)[:, None])


def test_the_interval_of_a_mean_is_that_of_normal_theory() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = figure(values.tolist()).interval
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.04)
    assert found.high == pytest.approx(values.mean() + half, abs=0.04)


def test_a_paired_difference_does_not_feel_what_the_prompts_share() -> None:
    hard = np.random.default_rng(0).normal(0.0, 5.0, 100)
    better, worse = figure((hard + 1).tolist()), figure(hard.tolist())
    found = better.minus(worse)
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    assert better.interval.high - better.interval.low > 1.0
    with pytest.raises(ValueError, match="100 prompts against 3"):
        better.minus(figure([1.0, 2.0, 3.0]))


def test_every_figure_of_an_evaluation_agrees_with_its_metric() -> None:
    evaluation = evaluate(2)
    figures = figures_of(evaluation, per_prompt=2, reward="length")
    for name, metric in (
        ("reward", "reward_mean"),
        ("reward_minimum", "reward_minimum_mean"),
        ("perplexity", "perplexity_reference"),
        ("kl_policy_to_reference", "kl_policy_to_reference"),
        ("kl_reference_to_policy", "kl_reference_to_policy"),
        ("kl_sampled", "kl_sampled_per_completion"),
        ("tokens", "completion_length_mean"),
        ("distinct_2_words", "distinct_2_per_prompt"),
    ):
        expected = evaluation.metrics[metric]
        assert figures[name].value == pytest.approx(expected, rel=1e-6, nan_ok=True), name
    assert figures["again"].value == pytest.approx(evaluation.judges["again"])
    for name in figures:
        interval = figures[name].interval
        assert math.isnan(interval.mean) or interval.low <= interval.mean <= interval.high, name
