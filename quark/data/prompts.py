"""Reads prompts from files or from quark's assets, tokenizes them once and splits them once.

A bad row is an error that names the file, the line and the reason; nothing is skipped silently.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
from pydantic import Field, field_validator

from quark.assets import asset_path
from quark.bounded_files import lines_of, parquet_frames, parse_json
from quark.csv_files import csv_rows
from quark.data.chat import (
    MESSAGES_KEY,
    TOOLS_KEY,
    Chat,
    ChatTokenizer,
    Message,
    messages_in,
    stored_messages,
    without_the_oldest_turn,
)
from quark.data.hub_files import hub_file, is_on_hub
from quark.errors import DataError
from quark.models.additions import additions_of
from quark.settings import Settings
from quark.types import Json, Prompt

_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_PROMPT_BYTES = 1 << 20
"""Size of one prompt in UTF-8. A tokenizer needs about a hundred times that in memory."""


_FIELD = "prompt"


class PromptConfig(Settings):
    """Prompts for training and evaluation."""

    source: str = "embedded:reviews"
    """A ``.jsonl``, ``.csv``, ``.txt`` (one prompt a line), ``.wp_source`` (WritingPrompts) or ``.parquet`` file,
    ``embedded:reviews``, or a file of a data set on the Hub: ``hf://datasets/OWNER/NAME[@REVISION]/FILE``."""
    field: str = _FIELD
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
                _condition(where)
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


_JSON_LINES = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".wp_source")
_WRITING_PROMPT = re.compile(r"^\s*\[ ?[A-Za-z]+ ?\]\s*")
"""What a row of WritingPrompts begins with, such as ``[ WP ]``."""
_TRAINED_ON = (None, "", "train")
_HELD_OUT = ("eval", "validation")
"""Values of ``split`` in a row; None is a row without one."""


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    text: str
    split: str | None
    metadata: Mapping[str, Json]
    messages: tuple[Message, ...] = ()
    """Where the prompt is a conversation; ``text`` is its JSON then."""
    tools: Json = None


def load_prompts(
    config: PromptConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    room: int | None = None,
) -> PromptSet:
    """Read, check, split and tokenize.

    Args:
        config: where the prompts are, and which are used.
        tokenizer: of the model.
        seed: of the split.
        room: tokens that the model's context has for a prompt; None is without limit.

    No prompt is on both sides. Prompts count as equal if their tokens are equal after truncation to
    ``max_tokens``, or if they differ only in case and spaces. Held-out prompts are not trained on.

    Raises:
        FileNotFoundError: no such file.
        DataError: a row that is no prompt, or no prompts at all.
    """
    tokens = _Tokens(config, tokenizer, room=room)
    notes: list[str] = []
    rows = tokens.long_enough(
        _read(
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
            _read(
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
    rows: list[_Row], config: PromptConfig, tokens: _Tokens, notes: list[str], *, seed: int
) -> list[_Row]:
    """The rows that are held out if the source does not say which: each prompt once, at most half of them."""
    first: dict[str, _Row] = {}
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
        source: as ``PromptConfig.source``.
        field: as ``PromptConfig.field``.
        tokenizer: of the model.
        said_by: the option that named the file, for error messages.

    Raises:
        FileNotFoundError: no such file.
        DataError: a row that is no prompt, or no prompts at all.
    """
    rows = list(_read(source, field, None, said_by=said_by))
    if not rows:
        raise DataError(f"{source}: it contains no prompts")
    whole = PromptConfig(max_tokens=sys.maxsize)
    return _prompts(rows, whole, _Tokens(whole, tokenizer), [])


def _left_out(rows: list[_Row]) -> list[str]:
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
        config: how long prompts may be, and how conversations are rendered.
        tokenizer: of the model.
        room: tokens that the model's context has for a prompt; None is without limit.
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
        self._ids: dict[str, list[int]] = {}

    def of(self, row: _Row) -> list[int]:
        """All ids of a row."""
        if row.text not in self._ids:
            self._ids[row.text] = self._encoded(row, row.messages)
        return self._ids[row.text]

    def shortened(self, row: _Row) -> list[int] | None:
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

    def long_enough(self, rows: Iterator[_Row], notes: list[str]) -> list[_Row]:
        """The rows of at least ``min_tokens`` tokens; a note says how many others there are."""
        least = self._config.min_tokens
        found = list(rows)
        kept = [row for row in found if least == 1 or len(self.of(row)) >= least]
        if len(kept) < len(found):
            notes.append(f"{_counted(len(found) - len(kept))} left out: under {least} tokens")
        return kept

    def identity(self, row: _Row) -> str:
        """Equal for rows with the same prompt: as the model sees them, or except for case and spaces."""
        ids = self.of(row)
        if self._config.over_long in ("truncate", "head"):
            ids = self.shortened(row) or ids
        return " ".join(self.text(ids).casefold().split()) or str(ids)

    def whole_text(self, row: _Row) -> str:
        """The text of a row that is not shortened; a conversation without its special tokens."""
        return self.text(self.of(row)) if row.messages else row.text

    def _encoded(self, row: _Row, messages: Sequence[Message]) -> list[int]:
        if messages:
            text = self._chat.render(messages, row.tools, row.place)
            return self._tokenizer.encode(text, add_special_tokens=False)
        ids = self._tokenizer.encode(row.text, add_special_tokens=False)
        return self._additions.begin(ids) if ids else []


def _prompts(
    rows: list[_Row], config: PromptConfig, tokens: _Tokens, notes: list[str]
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
            Prompt(index=len(prompts), text=text, token_ids=tuple(ids), metadata=row.metadata)
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


def source_file(source: str, *, is_offline: bool = False) -> Path:
    """The file that ``PromptConfig.source`` names; it may not exist.

    Args:
        source: the setting.
        is_offline: whether a file on the Hub has to be in the cache.

    Raises:
        DataError: a file on the Hub that is not there.
    """
    if source.startswith("embedded:"):
        return asset_path("prompts", source.removeprefix("embedded:")).with_suffix(".jsonl")
    if is_on_hub(source):
        return hub_file(source, is_offline=is_offline)
    return Path(source).expanduser()


def check_sources(config: PromptConfig) -> None:
    """Check that the files with prompts exist, without reading them.

    Raises:
        FileNotFoundError: one is not.
        DataError: one is not a file of prompts, by its name.
    """
    for said_by, source in (
        ("prompts.source", config.source),
        ("prompts.evaluation_source", config.evaluation_source),
    ):
        if source is not None and not is_on_hub(source):
            _path_of(source, config.where, said_by=said_by)


def _path_of(source: str, where: str | None, *, said_by: str) -> Path:
    path = source_file(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no prompt file {path.absolute()}: check {said_by}")
    if not path.is_file():
        raise DataError(
            f"{path} is not a file: {said_by} names a .jsonl, .csv, .txt, .wp_source or .parquet file"
        )
    suffix = path.suffix.lower()
    if suffix in _TEXT and where is not None:
        raise DataError(f"{path}: lines of text have no numbers for prompts.where: unset it")
    if suffix not in (*_JSON_LINES, *_TEXT, ".csv", ".parquet"):
        raise DataError(
            f"{path}: prompts come from .jsonl, .csv, .txt, .wp_source or .parquet files, not {suffix!r}"
        )
    return path


def _read(
    source: str, field: str, where: str | None, *, said_by: str, skips_blank: bool = False
) -> Iterator[_Row]:
    path = _path_of(source, where, said_by=said_by)
    fits = _everything if where is None else _condition(where)
    match path.suffix.lower():
        case ".txt":
            for number, line in text_lines(path):
                yield _row(f"{path}:{number}", line, None, {})
        case ".wp_source":
            for number, line in text_lines(path):
                yield _row(f"{path}:{number}", _WRITING_PROMPT.sub("", line), None, {})
        case ".parquet":
            yield from _read_parquet(path, field, fits, skips_blank=skips_blank)
        case ".csv":
            yield from _read_csv(path, field, fits, skips_blank=skips_blank)
        case _:
            yield from _read_jsonl(path, field, fits, skips_blank=skips_blank)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines of a file with their numbers, without byte-order mark and line ends.

    Raises:
        DataError: a line that is too long or not UTF-8, by its number.
    """
    for number, line in lines_of(path):
        try:
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as err:
            raise DataError(f"{path}:{number}: not UTF-8 at byte {err.start} of the line") from err
        if text.strip():
            yield number, text


def _no_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise DataError("a key appears twice")
    return record


def _read_jsonl(path: Path, field: str, fits: _Condition, *, skips_blank: bool) -> Iterator[_Row]:
    for number, line in text_lines(path):
        place = f"{path}:{number}"
        try:
            record = parse_json(line, object_pairs_hook=_no_duplicates)
        except (ValueError, DataError) as err:
            raise DataError(f"{place}: {err}") from err
        if not isinstance(record, dict):
            raise DataError(f"{place}: not a JSON object but a {type(record).__name__}")
        if fits(record) and not (skips_blank and _is_blank(record.get(field))):
            yield _record_row(place, record, field)


def _read_parquet(path: Path, field: str, fits: _Condition, *, skips_blank: bool) -> Iterator[_Row]:
    records = (record for frame in parquet_frames(path) for record in frame.iter_rows(named=True))
    for number, record in enumerate(records, start=1):
        if fits(record) and not (skips_blank and _is_blank(record.get(field))):
            yield _record_row(f"{path}: row {number}", record, field)


def _read_csv(path: Path, field: str, fits: _Condition, *, skips_blank: bool) -> Iterator[_Row]:
    for number, row in enumerate(csv_rows(path), start=1):
        place = f"{path}: row {number}"
        if isinstance(row, str):
            raise DataError(f"{place}: {row}")
        record = {
            name: value if name in (field, "split") else _number_or_text(value)
            for name, value in row.items()
        }
        if fits(record) and not (skips_blank and _is_blank(record.get(field))):
            yield _record_row(place, record, field)


def _number_or_text(value: str | None) -> Json:
    """A value of CSV, which does not tell numbers from texts."""
    for kind in (int, float):
        try:
            number = kind(value or "")
        except ValueError:
            continue
        return number if math.isfinite(number) else value
    return value


def _is_blank(value: Json) -> bool:
    return isinstance(value, str) and not value.strip()


_Condition: TypeAlias = Callable[[Mapping[str, Json]], bool]
"""Whether a record is used."""
_COMPARE = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
    "==": operator.eq,
}


def _everything(_record: Mapping[str, Json]) -> bool:
    return True


def _condition(where: str) -> _Condition:
    """Whether a record has the number that ``where`` names, and it satisfies the comparison.

    Raises:
        ValueError: ``where`` is not a key, a comparison and a number.
    """
    key, sign, text = re.split(r"\s*(>=|>|<=|<|==)\s*", where.strip())
    if not re.fullmatch(r"[^\s<>=]+", key) or not re.fullmatch(r"[0-9.eE+-]+", text):
        raise ValueError(where)
    path, compare, bound = key.split("."), _COMPARE[sign], float(text)

    def fits(record: Mapping[str, Json]) -> bool:
        value: Json | Mapping[str, Json] = record
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        return isinstance(value, int | float) and compare(value, bound)

    return fits


def _record_row(place: str, record: Mapping[str, Json], field: str) -> _Row:
    if field == _FIELD and field not in record and MESSAGES_KEY in record:
        field = MESSAGES_KEY
    if field not in record:
        known = ", ".join(sorted(record)) or "none"
        raise DataError(f"{place}: no field {field!r} (it has: {known}); set prompts.field")
    value = record[field]
    messages: tuple[Message, ...] = ()
    if isinstance(value, list):
        messages = messages_in(value, place)
        value = stored_messages(messages)
    if isinstance(value, Mapping):
        value = value.get("text")
    if not isinstance(value, str):
        raise DataError(f"{place}: {field!r} is {repr(value)[:40]}, not a text")
    split = record.get("split")
    metadata = {
        key: None if isinstance(item, float) and not math.isfinite(item) else item
        for key, item in record.items()
        if key not in (field, "split") and isinstance(item, str | int | float | bool | None)
    }  # a number that is not finite stands for a missing one, and JSON has no word for it
    for key, item in metadata.items():
        if not (_is_json(key) and _is_json(item)):
            raise DataError(
                f"{place}: {key!a} is {str(item)[:40]!a}, which JSON cannot represent and a pool cannot store: leave it out"
            )
    split = split if isinstance(split, str) else None
    if not messages:
        return _row(place, value, split, metadata)
    row = _row(place, value, split, metadata | {MESSAGES_KEY: value})
    return replace(row, messages=messages, tools=record.get(TOOLS_KEY))


def _is_json(item: Json) -> bool:
    """Whether a plain value fits every JSON: a number that a float can hold, a text without lone surrogates."""
    try:
        if isinstance(item, int | float):
            return math.isfinite(item)
        str(item).encode()
    except (OverflowError, UnicodeEncodeError):
        return False
    return True


def _row(place: str, text: str, split: str | None, metadata: Mapping[str, Json]) -> _Row:
    if not text.strip():
        raise DataError(f"{place}: an empty prompt")
    if (num_bytes := len(text.encode("utf-8", "replace"))) > MAX_PROMPT_BYTES:
        raise DataError(
            f"{place}: the prompt has {num_bytes:,} bytes, the most is {MAX_PROMPT_BYTES:,}: shorten it, or leave it out"
        )
    if "\0" in text:
        raise DataError(f"{place}: a NUL character in the prompt")
    if _SURROGATE.search(text):
        raise DataError(f"{place}: a lone surrogate in the prompt")
    return _Row(place=place, text=text, split=split, metadata=metadata)
