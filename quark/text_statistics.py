"""Distinct and repeated word n-grams of texts.

Words are what stands between whitespace. Definitions:

- ``distinct_n``: distinct n-grams over the number of n-grams of all texts together, or over the number
  of words as in the published code of Quark (Lu et al. 2022) and DExperts, which makes long n-grams of
  short texts look rarer than they are;
- ``repetition_n`` (rep-n of Welleck et al. 2020): 1 - distinct / all n-grams of one text;
- ``diversity`` (Su et al. 2022): the product of (1 - rep-n) for n = 2, 3, 4.

Texts too short for an n-gram have nothing repeated: rep-n 0, diversity 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Literal, TypeAlias

Denominator: TypeAlias = Literal["ngrams", "words"]
Ngram: TypeAlias = tuple[str, ...]

_DIVERSITY_ORDERS = (2, 3, 4)


def words(text: str) -> list[str]:
    """The text's words.

    >>> words(" easy  to use ")
    ['easy', 'to', 'use']
    """
    return text.split()


def ngrams(sequence: Sequence[str], n: int) -> list[Ngram]:
    """All runs of ``n`` neighbours, in order; empty if the sequence is shorter.

    >>> ngrams(["a", "b", "c"], 2)
    [('a', 'b'), ('b', 'c')]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return list(zip(*(islice(sequence, start, None) for start in range(n)), strict=False))


def distinct_n(texts: Iterable[str], n: int, *, denominator: Denominator = "ngrams") -> float:
    """Share of distinct n-grams in all texts together; NaN if the denominator is zero.

    >>> distinct_n(["a b a b"], 2), distinct_n(["a b a b"], 2, denominator="words")
    (0.6666666666666666, 0.5)
    """
    distinct: set[Ngram] = set()
    num_ngrams = num_words = 0
    for text in texts:
        tokens = words(text)
        found = ngrams(tokens, n)
        distinct.update(found)
        num_ngrams += len(found)
        num_words += len(tokens)
    total = num_ngrams if denominator == "ngrams" else num_words
    return len(distinct) / total if total else float("nan")


def repetition_n(text: str, n: int) -> float:
    """rep-n of one text, in [0, 1).

    >>> repetition_n("a b a b", 2)
    0.33333333333333337
    """
    found = ngrams(words(text), n)
    return 1.0 - len(set(found)) / len(found) if found else 0.0


def corpus_repetition_n(texts: Iterable[str], n: int) -> float:
    """rep-n with distinct and all n-grams counted per text and summed over the texts, as SimCTG reports it.

    Unlike SimCTG's code this counts the last n-gram of each text. 0 without any n-gram.
    """
    num_distinct = num_all = 0
    for text in texts:
        found = ngrams(words(text), n)
        num_distinct += len(set(found))
        num_all += len(found)
    return 1.0 - num_distinct / num_all if num_all else 0.0


def diversity(text: str) -> float:
    """Product of (1 - rep-n) for n = 2, 3, 4 of one text, in (0, 1]; 1 means nothing is repeated.

    >>> diversity("easy to use"), round(diversity("no no no no no no"), 4)
    (1.0, 0.0167)
    """
    product = 1.0
    for n in _DIVERSITY_ORDERS:
        product *= 1.0 - repetition_n(text, n)
    return product


def corpus_diversity(texts: Sequence[str]) -> float:
    """Product of (1 - corpus rep-n) for n = 2, 3, 4."""
    product = 1.0
    for n in _DIVERSITY_ORDERS:
        product *= 1.0 - corpus_repetition_n(texts, n)
    return product
