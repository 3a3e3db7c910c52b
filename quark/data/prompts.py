"""Tokenizes prompts once, and splits them once into a part to train on and a held-out part."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from pydantic import Field, field_validator

from quark.data.chat import Chat, ChatTokenizer, Message, without_the_oldest_turn
from quark.data.hub_files import is_on_hub
from quark.data.prompt_rows import PROMPT_FIELD, PromptRow, condition_of, path_of, read_rows
from quark.errors import DataError
from quark.models.additions import additions_of
from quark.settings import Settings
from quark.types import Prompt


class PromptConfig(Settings):
    """Prompts for training and evaluation."""

    source: str = "embedded:reviews"
    """A ``.jsonl``, ``.csv``, ``.txt`` (one prompt a line), ``.wp_source`` (WritingPrompts) or ``.parquet`` file,
    ``embedded:reviews``, or a file of a data set on the Hub: ``hf://datasets/OWNER/NAME[@REVISION]/FILE``."""
    field: str = PROMPT_FIELD
    """The column of a JSONL, CSV or Parquet file; if it holds an object, as in RealToxicityPrompts, its
    ``text`` key is read. A list is a conversation of messages with roles and contents, rendered by
    the model's chat template. If there is no column ``prompt``, ``messages`` is read."""
    where: str | None = None
    """Keep only rows whose record satisfies a numeric condition, e.g. ``"prompt.toxicity >= 0.5"``;
    dots address nested objects. Rows without the number are left out."""
    evaluation_source: str | None = None
    """A file with the held-out prompts; unset takes rows with ``split`` = ``eval`` or
    ``validation``, or else a seeded part of the source. Only rows with ``split`` = ``train``, or
    none, are trained on."""
    num_evaluation: int = Field(128, ge=1)
    """Maximum number of prompts held out for evaluation; a seeded part is at most half of the
    distinct prompts."""
    limit: int | None = Field(None, ge=1)
    """Use only this many training prompts, chosen by the seed."""
    min_tokens: int = Field(1, ge=1)
    """Shorter rows, blank ones included, are left out, counted and reported: headings of WikiText, for
    example."""
    max_tokens: int = Field(64, ge=1)
    """Longer prompts are handled as ``over_long`` says. So are prompts that do not fit the model's
    context together with ``sampling.max_new_tokens``."""
    over_long: Literal["truncate", "head", "skip", "fail"] = "truncate"
    """Keep the last ``max_tokens`` tokens, keep the first ones, leave the prompt out (all are counted
    and reported), or stop. A beginning-of-sequence token is kept. A prompt of messages loses its oldest turns, and is
    left out if its last turn alone is too long."""
    template_arguments: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further values for the chat template that renders prompts of messages, such as
    ``enable_thinking``."""

    @field_validator("where")
    @classmethod
    def _where_compares_with_a_number(cls, where: str | None) -> str | None:
        if where is not None:
            try:
                condition_of(where)
            except ValueError as err:
                raise ValueError(
                    'not a field, a comparison and a number, such as "prompt.toxicity >= 0.5"'
                ) from err
        return where


class Tokenizer(ChatTokenizer, Protocol):
    """The part of a tokenizer that quark uses."""

    def encode(
        self, text: str, text_pair: str | None = ..., *, add_special_tokens: bool = ...
    ) -> list[int]:
        """Turn a text, or two, into token ids, with the model's special tokens if ``add_special_tokens`` is set."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str:
        """Turn token ids into text, leaving special tokens out if ``skip_special_tokens`` is set."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts, split."""

    train: tuple[Prompt, ...]
    evaluation: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()
    """Notes for the user: prompts truncated or skipped, repeats of held-out prompts, too few
    prompts."""


_TRAINED_ON = (None, "", "train")
_HELD_OUT = ("eval", "validation")
"""Values of ``split`` in a row; None is a row without one."""


def load_prompts(
    config: PromptConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    room: int | None = None,
) -> PromptSet:
    """Read, check, split and tokenize.

    Args:
        config: the files with prompts, and the choice among them.
        tokenizer: the tokenizer of the model.
        seed: the seed of the split.
        room: maximum number of prompt tokens that the model's context allows; None for no limit.

    No prompt is on both sides. Prompts count as equal if their tokens are equal after truncation to
    ``max_tokens``, or if they differ only in case and spaces. Held-out prompts are not trained on.

    Raises:
        FileNotFoundError: a file does not exist.
        DataError: a row is not a prompt, or there are no prompts.
    """
    tokens = _Tokens(config, tokenizer, room=room)
    notes: list[str] = []
    rows = tokens.long_enough(
        read_rows(
            config.source,
            config.field,
            config.where,
            said_by="prompts.source",
            skips_blank=config.min_tokens > 1,
        ),
        notes,
    )
    if not rows and config.where is not None:
        raise DataError(f"{config.source}: no row fits prompts.where = {config.where!r}")
    train_rows = [row for row in rows if row.split in _TRAINED_ON]
    held_out_rows = [row for row in rows if row.split in _HELD_OUT]
    notes += _left_out(rows)
    num_drawn = 0
    if config.evaluation_source is not None:
        evaluation_rows = tokens.long_enough(
            read_rows(
                config.evaluation_source,
                config.field,
                config.where,
                said_by="prompts.evaluation_source",
                skips_blank=config.min_tokens > 1,
            ),
            notes,
        )
    elif held_out_rows:
        evaluation_rows = held_out_rows
    else:
        evaluation_rows = _seeded_part(train_rows, config, tokens, notes, seed=seed)
        num_drawn = len(evaluation_rows)
    evaluation_rows = evaluation_rows[: config.num_evaluation]
    held_out = {tokens.identity(row) for row in evaluation_rows}
    kept = [row for row in train_rows if tokens.identity(row) not in held_out]
    num_repeats = len(train_rows) - len(kept) - num_drawn
    if num_repeats:
        notes.append(
            f"{num_repeats} prompts are not trained on: they equal held-out ones, as the model sees them or but for "
            "case and spaces"
        )
    if config.limit is not None and config.limit < len(kept):
        chosen = np.random.default_rng(seed + 1).permutation(len(kept))[: config.limit]
        kept = [kept[i] for i in sorted(chosen.tolist())]
    train = _prompts(kept, config, tokens, notes)
    evaluation = _prompts(evaluation_rows, config, tokens, notes)
    if not train or not evaluation:
        raise DataError(
            f"{config.source}: {_counted(len(train))} to train and {len(evaluation)} to evaluate on; "
            "both are needed (at least two different prompts, or an evaluation_source with others)"
            + "".join(f". {note}" for note in notes)
        )
    return PromptSet(train=train, evaluation=evaluation, notes=tuple(notes))


def _seeded_part(
    rows: list[PromptRow], config: PromptConfig, tokens: _Tokens, notes: list[str], *, seed: int
) -> list[PromptRow]:
    """The rows that are held out if the source does not say which: each prompt once, at most half of them."""
    first: dict[str, PromptRow] = {}
    for row in rows:
        first.setdefault(tokens.identity(row), row)
    distinct = list(first.values())
    count = min(config.num_evaluation, len(distinct) // 2)
    if 0 < count < config.num_evaluation:
        notes.append(
            f"{count} of {len(distinct)} different prompts are held out, half of them: prompts.num_evaluation asks for "
            f"{config.num_evaluation}, and the source does not say which"
        )
    order = np.random.default_rng(seed).permutation(len(distinct))
    return [distinct[i] for i in sorted(order[:count].tolist())]


def read_prompts(
    source: str, field: str, tokenizer: Tokenizer, *, said_by: str
) -> tuple[Prompt, ...]:
    """Every prompt of a file, complete and in order, whatever its ``split``.

    Args:
        source: like ``PromptConfig.source``.
        field: like ``PromptConfig.field``.
        tokenizer: the tokenizer of the model.
        said_by: the option that names the file, for error messages.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: a row is not a prompt, or there are no prompts.
    """
    rows = list(read_rows(source, field, None, said_by=said_by))
    if not rows:
        raise DataError(f"{source}: it contains no prompts")
    whole = PromptConfig(max_tokens=sys.maxsize)
    return _prompts(rows, whole, _Tokens(whole, tokenizer), [])


def _left_out(rows: list[PromptRow]) -> list[str]:
    """Reports rows that belong to neither part: a test set must not be used for training or tuning."""
    others = Counter(row.split for row in rows if row.split not in (*_TRAINED_ON, *_HELD_OUT))
    return [
        f"{_counted(count)} with split = {split!r} left out: rows with train, or without a split, are trained "
        "on, those with eval or validation are held out"
        for split, count in others.items()
    ]


def _counted(count: int) -> str:
    return "1 prompt" if count == 1 else f"{count:,} prompts"


class _Tokens:
    """The rows' tokens, each row tokenized once.

    Args:
        config: length limits, and how to render conversations.
        tokenizer: the tokenizer of the model.
        room: maximum number of prompt tokens that the model's context allows; None for no limit.
    """

    def __init__(
        self, config: PromptConfig, tokenizer: Tokenizer, *, room: int | None = None
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._additions = additions_of(tokenizer)
        self._chat = Chat(tokenizer, config.template_arguments)
        self.most = config.max_tokens if room is None else min(config.max_tokens, room)
        """Tokens of the longest prompt."""
        self.is_limited_by_the_model = self.most < config.max_tokens
        self._ids: dict[tuple[str, bool, str], list[int]] = {}

    def of(self, row: PromptRow) -> list[int]:
        """All ids of a row."""
        # Tools are rendered, too, and a plain text may look like messages.
        key = (row.text, bool(row.messages), repr(row.tools))
        if key not in self._ids:
            self._ids[key] = self._encoded(row, row.messages)
        return self._ids[key]

    def shortened(self, row: PromptRow) -> list[int] | None:
        """At most ``most`` ids of a row; None for a conversation whose last turn is longer."""
        ids = self.of(row)
        if not row.messages:
            if self._config.over_long == "head":
                return ids[: self.most]
            return self._additions.shorten(ids, self.most)
        messages: tuple[Message, ...] | None = row.messages
        while len(ids) > self.most:
            messages = without_the_oldest_turn(messages) if messages else None
            if messages is None:
                return None
            ids = self._encoded(row, messages)
        return ids

    def text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def long_enough(self, rows: Iterator[PromptRow], notes: list[str]) -> list[PromptRow]:
        """The rows of at least ``min_tokens`` tokens; a note says how many others there are."""
        least = self._config.min_tokens
        found = list(rows)
        kept = [row for row in found if least == 1 or len(self.of(row)) >= least]
        if len(kept) < len(found):
            notes.append(f"{_counted(len(found) - len(kept))} left out: under {least} tokens")
        return kept

    def identity(self, row: PromptRow) -> str:
        """Equal for rows with the same prompt: as the model sees them, or except for case and spaces."""
        ids = self.of(row)
        if self._config.over_long in ("truncate", "head"):
            ids = self.shortened(row) or ids
        return " ".join(self.text(ids).casefold().split()) or str(ids)

    def whole_text(self, row: PromptRow) -> str:
        """The text of a row that is not shortened; a conversation without its special tokens."""
        return self.text(self.of(row)) if row.messages else row.text

    def _encoded(self, row: PromptRow, messages: Sequence[Message]) -> list[int]:
        if messages:
            text = self._chat.render(messages, row.tools, row.place)
            return self._tokenizer.encode(text, add_special_tokens=False)
        ids = self._tokenizer.encode(row.text, add_special_tokens=False)
        return self._additions.begin(ids) if ids else []


def _prompts(
    rows: list[PromptRow], config: PromptConfig, tokens: _Tokens, notes: list[str]
) -> tuple[Prompt, ...]:
    prompts: list[Prompt] = []
    num_cut = num_left_out = 0
    for row in rows:
        ids = tokens.of(row)
        if not ids:
            raise DataError(f"{row.place}: the prompt {row.text[:40]!r} has no tokens")
        text = tokens.whole_text(row)
        if len(ids) > tokens.most:
            if config.over_long == "fail":
                raise DataError(
                    f"{row.place}: the prompt has {len(ids)} tokens, {_limit(tokens)} set prompts.over_long"
                )
            shortened = tokens.shortened(row) if config.over_long in ("truncate", "head") else None
            if shortened is None:
                num_left_out += 1
                continue
            num_cut += 1
            ids = shortened
            text = tokens.text(ids)
        prompts.append(
            Prompt(
                index=len(prompts),
                text=text,
                token_ids=tuple(ids),
                metadata=row.metadata,
                place=row.place,
            )
        )
    most = f"{tokens.most} token" + ("" if tokens.most == 1 else "s")
    why = ", which the model's context leaves" if tokens.is_limited_by_the_model else ""
    if num_cut:
        end = "first" if config.over_long == "head" else "last"
        notes.append(f"{_counted(num_cut)} cut to the {end} {most}{why}")
    if num_left_out:
        notes.append(f"{_counted(num_left_out)} left out: over {most}{why}")
    return tuple(prompts)


def _limit(tokens: _Tokens) -> str:
    if tokens.is_limited_by_the_model:
        return f"and the model's context leaves {tokens.most} beside sampling.max_new_tokens: lower that, or"
    return f"prompts.max_tokens is {tokens.most}: raise it, or"


def check_sources(config: PromptConfig) -> None:
    """Check that the files with prompts exist, without reading them.

    Raises:
        FileNotFoundError: a file does not exist.
        DataError: the name of a file does not fit a file of prompts.
    """
    for said_by, source in (
        ("prompts.source", config.source),
        ("prompts.evaluation_source", config.evaluation_source),
    ):
        if source is not None and not is_on_hub(source):
            path_of(source, config.where, said_by=said_by)
