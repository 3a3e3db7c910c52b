"""The special tokens that a tokenizer adds to a text by itself. Tried, not read from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Encoder(Protocol):
    """The part of a tokenizer that is used here."""

    def encode(
        self, text: str, text_pair: str | None = ..., *, add_special_tokens: bool = ...
    ) -> list[int]:
        """Turn a text, or two, into token ids."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Additions:
    """What a tokenizer adds: ``before``, a text, ``after``; in a pair also ``between`` the two texts."""

    before: tuple[int, ...] = ()
    """Usually a beginning-of-sequence token, or nothing."""
    after: tuple[int, ...] = ()
    """Usually nothing. An end-of-sequence token here would end a prompt, so prompts go without."""
    between: tuple[int, ...] = ()
    """In a pair, without what comes after a text."""

    def begin(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a prompt: ``before`` and ``ids``, once if the text begins with ``before`` already.

        A prompt that a chat template has rendered usually does.
        """
        is_there = bool(self.before) and tuple(ids[: len(self.before)]) == self.before
        return [*ids] if is_there else [*self.before, *ids]

    def shorten(self, ids: Sequence[int], length: int) -> list[int]:
        """The last ``length`` tokens of a prompt, with ``before`` still at its start if there is room."""
        if len(ids) <= length:
            return [*ids]
        num_kept = len(self.before)
        if tuple(ids[:num_kept]) != self.before or num_kept >= length:
            return [*ids[-length:]]
        return [*self.before, *ids[num_kept - length :]]


def additions_of(tokenizer: Encoder) -> Additions:
    """What ``tokenizer`` adds to a text and to a pair of texts."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    before, after = _around(tokenizer.encode("a"), plain)
    pair = tokenizer.encode("a", "a")[len(before) + len(plain) :]
    between, _ = _around(pair, plain)
    if between[: len(after)] == after:
        between = between[len(after) :]
    return Additions(before=before, after=after, between=between)


def _around(whole: list[int], plain: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before and behind ``plain`` in ``whole``; nothing if it is not in it."""
    for begin in range(len(whole) - len(plain) + 1):
        end = begin + len(plain)
        if whole[begin:end] == plain:
            return tuple(whole[:begin]), tuple(whole[end:])
    return (), ()
