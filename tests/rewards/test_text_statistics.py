import math

import pytest

from quark.text_statistics import (
    bleu,
    corpus_diversity,
    corpus_repetition_n,
    distinct_n,
    diversity,
    ngrams,
    repetition_n,
    self_bleu,
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


def test_the_published_off_by_one_leaves_out_the_last_ngram_of_each_text():
    # Bigrams without the last: (x y) (y x); nothing is repeated.
    assert corpus_repetition_n(["x y x y"], 2) == pytest.approx(1 / 3)
    assert corpus_repetition_n(["x y x y"], 2, omits_last=True) == 0.0
    # "a a a a a" without the last: 3 bigrams, 2 trigrams, 1 four-gram, one of each distinct.
    assert corpus_diversity(["a a a a a"], omits_last=True) == pytest.approx(1 / 3 * 1 / 2)
    assert corpus_diversity(["one"], omits_last=True) == 1.0


def test_bleu_by_hand():
    # 3 of 4 words, 1 of 3 bigrams, no trigram (smoothed 1 / (2 * 2)), no four-gram (1 / (4 * 1)); as long as the text.
    expected = (3 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25
    assert bleu("a b c d", ["a b x d"]) == pytest.approx(expected)
    assert bleu("a b", ["a b c d"]) == pytest.approx(math.exp(1 - 4 / 2))
    assert bleu("q", ["a b"]) == bleu("", ["a"]) == bleu("a", []) == 0.0


def test_bleu_is_that_of_sacrebleu():
    """Recorded from sacrebleu 2.6.0: sentence_bleu(..., tokenize="none", use_effective_order=True)."""
    recorded = [
        ("d a c e d d", ["c e b e b c b", "e", "e e b c"], 0.13741272855400097),
        ("the cat sat on the mat", ["the cat sat on a mat", "a cat"], 0.537284965911771),
        ("no no no", ["no way", "yes no"], 0.27516060407455223),
    ]
    for text, references, expected in recorded:
        assert bleu(text, references) == pytest.approx(expected, abs=1e-12), text


def test_self_bleu_is_1_for_equal_texts_and_undefined_for_one():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b", "c d"]) == 0.0
    assert self_bleu(["", "a"]) == 0.0
    assert math.isnan(self_bleu(["a b"]))


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
