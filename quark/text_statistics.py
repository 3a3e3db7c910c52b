"""Distinct and repeated word n-grams of texts.

Words are what stands between whitespace. Definitions:

- ``distinct_n``: distinct n-grams over the number of n-grams of all texts together, or over the number
  of words as in the published code of Quark (Lu et al. 2022) and DExperts, which makes long n-grams of
  short texts look rarer than they are;
- ``repetition_n`` (rep-n of Welleck et al. 2020): 1 - distinct / all n-grams of one text;
- ``diversity`` (Su et al. 2022): the product of (1 - rep-n) for n = 2, 3, 4;
- ``self_bleu`` (Zhu et al. 2018): BLEU of each text against the others, higher means more alike.

Texts too short for an n-gram have nothing repeated: rep-n 0, diversity 1.
"""

from __future__ import annotations

import math
from collections import Counter
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


def ngram_counts(text: str, n: int, *, omits_last: bool = False) -> tuple[int, int]:
    """Number of distinct and of all n-grams of one text.

    Args:
        text: any text.
        n: order.
        omits_last: leave the last n-gram of the text out, as SimCTG's published code does by mistake.

    >>> ngram_counts("a b a b", 2), ngram_counts("a b a b", 2, omits_last=True)
    ((2, 3), (2, 2))
    """
    found = ngrams(words(text), n)
    if omits_last:
        found = found[:-1]
    return len(set(found)), len(found)


def corpus_repetition_n(texts: Iterable[str], n: int, *, omits_last: bool = False) -> float:
    """rep-n with distinct and all n-grams counted per text and summed over the texts, as SimCTG reports it.

    ``omits_last`` as in ``ngram_counts``. 0 without any n-gram.
    """
    num_distinct = num_all = 0
    for text in texts:
        distinct, total = ngram_counts(text, n, omits_last=omits_last)
        num_distinct += distinct
        num_all += total
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


def corpus_diversity(texts: Sequence[str], *, omits_last: bool = False) -> float:
    """Product of (1 - corpus rep-n) for n = 2, 3, 4; ``omits_last`` as in ``ngram_counts``."""
    product = 1.0
    for n in _DIVERSITY_ORDERS:
        product *= 1.0 - corpus_repetition_n(texts, n, omits_last=omits_last)
    return product


_BLEU_ORDERS = (1, 2, 3, 4)


def bleu(text: str, references: Sequence[str]) -> float:
    """Sentence BLEU-4 in [0, 1] as sacrebleu computes it, on words between whitespace.

    Orders that the text is too short for do not count, an order without a match gets half of the last
    smoothed precision ("exp"), and the reference of the closest length sets the brevity penalty. 0 for a
    text without words.

    >>> round(bleu("a b c d", ["a b c d e"]), 4), bleu("", ["a"])
    (0.7788, 0.0)
    """
    tokens, others = words(text), [words(reference) for reference in references]
    if not tokens or not others:
        return 0.0
    log_precisions = []
    smoothing = 1.0
    for n in _BLEU_ORDERS:
        found = Counter(ngrams(tokens, n))
        if not found:
            break
        most: Counter[Ngram] = Counter()
        for other in others:
            most |= Counter(ngrams(other, n))
        matches = (found & most).total()
        if matches:
            log_precisions.append(math.log(matches / found.total()))
        else:
            smoothing *= 2.0
            log_precisions.append(-math.log(smoothing * found.total()))
    if len(log_precisions) == 0 or smoothing == 2.0 ** len(log_precisions):
        return 0.0  # nothing matches at all
    closest = min((abs(len(other) - len(tokens)), len(other)) for other in others)[1]
    penalty = min(0.0, 1.0 - closest / len(tokens))
    return math.exp(penalty + sum(log_precisions) / len(log_precisions))


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against all others; 1 if all are equal, NaN for fewer than two texts.

    >>> self_bleu(["a b c d", "a b c d"])
    1.0
    """
    if len(texts) < 2:
        return math.nan
    scores = [bleu(text, [*texts[:i], *texts[i + 1 :]]) for i, text in enumerate(texts)]
    return sum(scores) / len(scores)
