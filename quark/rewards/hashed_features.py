"""Hashed n-gram features of a whole batch of texts at once, for the linear scorer.

A text is lower-cased, its whitespace runs become single spaces and it gets a space at either end. Two
kinds of features live in one space of ``2**bits`` indices:

- *characters*: every run of 2 to 5 UTF-8 bytes that has a space only at its ends, so none spans words;
- *words*: single words and pairs of neighbors (anything between spaces without the punctuation around).

The batch is one byte array; n-grams are hashed with a rolling polynomial and words with differences of
its running sum, so no Python loop runs over characters or words. An index depends only on the n-gram's
bytes: scores do not depend on the batch a text came in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHARACTER_NGRAMS = (2, 3, 4, 5)
WORD_NGRAMS = (1, 2)

_CHARACTER_FACTOR = np.uint32(0x9E3779B1)
_CHARACTER_MIX = np.uint32(0x85EBCA6B)
_WORD_FACTOR = 0x9E3779B97F4A7C15
_WORD_FACTOR_INVERSE = pow(_WORD_FACTOR, -1, 2**64)
_WORD_MIX = np.uint64(0xD6E8FEB86659FD93)
_PAIR_FACTOR = np.uint64(0xC2B2AE3D27D4EB4F)
_SPACE = 0x20

_IS_WORD_BYTE = np.zeros(256, dtype=bool)
_IS_WORD_BYTE[[*b"abcdefghijklmnopqrstuvwxyz0123456789'", *range(0x80, 0x100)]] = True


@dataclass(frozen=True, slots=True)
class NgramIndices:
    """The n-grams of one kind and order: where each starts and which feature it is.

    ``index`` is uint32 [M] in [0, 2**bits); ``text`` is intp [M], ascending, the text each belongs to.
    """

    index: NDArray[np.uint32]
    text: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Normalized texts as one byte array; text ``i`` starts at ``starts[i]``."""

    data: NDArray[np.uint8]
    starts: NDArray[np.intp]

    @classmethod
    def of(cls, texts: Sequence[str]) -> TextBatch:
        """Normalize and concatenate; lone surrogates count as question marks."""
        normalized = [
            f" {' '.join(text.lower().split())} ".encode("utf-8", "replace") for text in texts
        ]
        lengths = np.fromiter(map(len, normalized), dtype=np.intp, count=len(normalized))
        return cls(
            data=np.frombuffer(b"".join(normalized), dtype=np.uint8),
            starts=np.cumsum(lengths) - lengths,
        )


def character_ngrams(batch: TextBatch, bits: int) -> list[NgramIndices]:
    """Indices of all byte n-grams inside words and across their edges, one entry per order."""
    data = batch.data
    is_space = data == _SPACE
    owner = np.repeat(
        np.arange(len(batch.starts)), np.diff(batch.starts, append=len(data)).astype(np.intp)
    )
    shift = np.uint32(32 - bits)
    rolling = data.astype(np.uint32)
    # valid[i]: the run that starts at i holds no space but at its ends, and is not spaces alone.
    valid = ~is_space
    found = []
    for order in CHARACTER_NGRAMS:
        width = max(0, len(data) - order + 1)
        rolling = rolling[:width] * _CHARACTER_FACTOR + data[order - 1 :]
        if order == 2:
            valid = ~(is_space[:width] & is_space[1:])
        else:
            valid = valid[:width] & ~is_space[order - 2 : order - 2 + width]
        where = np.flatnonzero(valid)
        mixed = rolling[where]
        mixed ^= mixed >> np.uint32(15)
        found.append(NgramIndices((mixed * _CHARACTER_MIX) >> shift, owner[where]))
    return found


def word_ngrams(batch: TextBatch, bits: int) -> list[NgramIndices]:
    """Indices of words and of pairs of neighboring words of one text."""
    data = batch.data
    is_word = _IS_WORD_BYTE[data]
    # A text starts and ends with a space, so edges come in pairs and no word spans two texts.
    edges = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1
    begin, end = edges[::2], edges[1::2]
    text = np.searchsorted(batch.starts, begin, side="right") - 1
    hashes = _span_hashes(data, begin, end)
    is_neighbour = text[1:] == text[:-1]
    pairs = (hashes[:-1] * _PAIR_FACTOR + hashes[1:])[is_neighbour]
    return [
        NgramIndices(_top_bits(hashes, bits), text),
        NgramIndices(_top_bits(pairs, bits), text[1:][is_neighbour]),
    ]


def _span_hashes(
    data: NDArray[np.uint8], begin: NDArray[np.intp], end: NDArray[np.intp]
) -> NDArray[np.uint64]:
    """A polynomial of each span's bytes modulo 2**64, wherever the span lies."""
    powers = _powers(_WORD_FACTOR, len(data))
    running = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(powers * data, out=running[1:])
    span: NDArray[np.uint64] = (running[end] - running[begin]) * _powers(
        _WORD_FACTOR_INVERSE, len(data)
    )[begin]
    return span


def _powers(factor: int, count: int) -> NDArray[np.uint64]:
    """``factor ** i`` modulo 2**64 for i = 0 .. count - 1."""
    powers = np.full(count, factor, dtype=np.uint64)
    powers[:1] = 1
    return np.multiply.accumulate(powers)


def _top_bits(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.uint32]:
    mixed = (hashes ^ (hashes >> np.uint64(29))) * _WORD_MIX
    return (mixed >> np.uint64(64 - bits)).astype(np.uint32)
