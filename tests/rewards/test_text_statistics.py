import math

import pytest

from quark.text_statistics import (
    corpus_diversity,
    corpus_repetition_n,
    distinct_n,
    diversity,
    ngrams,
    repetition_n,
)


def test_distinct_n_by_hand():
    # Bigrams: (a b) (b a) (a b) | (a b) (b c): 5 of which 3 differ; 4 + 3 words.
    texts = ["a b a b", "a b c"]
    assert distinct_n(texts, 2) == 3 / 5
    assert distinct_n(texts, 2, denominator="words") == 3 / 7
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 3) == 3 / 3
    assert distinct_n(texts, 3, denominator="words") == 3 / 7


def test_repetition_counts_every_ngram_and_the_last_one():
    # Bigrams: (x y) (y x) (x y): without the last one nothing would be repeated.
    assert repetition_n("x y x y", 2) == pytest.approx(1 - 2 / 3)
    assert repetition_n("x y x y", 3) == 0.0


def test_diversity_by_hand():
    # "a a a a a": rep-2 = 1 - 1/4, rep-3 = 1 - 1/3, rep-4 = 1 - 1/2.
    assert diversity("a a a a a") == pytest.approx(1 / 4 * 1 / 3 * 1 / 2)
    assert diversity("all words differ in this") == 1.0


def test_corpus_rates_sum_counts_over_texts():
    texts = ["a a a a a", "b c d e f"]
    assert corpus_repetition_n(texts, 2) == pytest.approx(1 - (1 + 4) / 8)
    assert corpus_diversity(texts) == pytest.approx(5 / 8 * 4 / 6 * 3 / 4)


def test_short_and_empty_texts_are_defined():
    assert diversity("") == 1.0
    assert repetition_n("one", 2) == 0.0
    assert math.isnan(distinct_n([], 1))
    assert math.isnan(distinct_n(["one"], 2))
    assert distinct_n(["one"], 2, denominator="words") == 0.0
    assert corpus_repetition_n([], 2) == 0.0


def test_n_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        ngrams(["a"], 0)
