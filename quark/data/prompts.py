"""Where prompts come from: files or what ships with quark, tokenized once, split once.

A bad row is an error that names the file, the line and the reason; nothing is skipped in silence.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
from pydantic import Field, field_validator

from quark.assets import asset_path
from quark.bounded_files import lines_of, parquet_frames, parse_json
from quark.errors import DataError
from quark.settings import Settings
from quark.types import Json, Prompt

_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_PROMPT_BYTES = 1 << 20
"""Of one prompt, in UTF-8. A tokenizer takes some hundred times that in memory."""


class PromptConfig(Settings):
    """Which prompts to train and to evaluate on."""

    source: str = "embedded:reviews"
    """A ``.jsonl``, ``.txt`` (one prompt a line) or ``.parquet`` file, or ``embedded:reviews``."""
    field: str = "prompt"
    """The column of a JSONL or Parquet file; an object in it is read by its ``text`` key, as
    RealToxicityPrompts has it."""
    where: str | None = None
    """Keep only rows where a number in the record fits, e.g. ``"prompt.toxicity >= 0.5"``; dots lead into nested
    objects. Rows without that number are left out."""
    evaluation_source: str | None = None
    """A file with the held-out prompts; unset takes rows with ``split`` = ``eval`` or ``validation``, or else a seeded
    part of the source. Only rows with ``split`` = ``train``, or none, are trained on."""
    num_evaluation: int = Field(128, ge=1)
    """How many prompts are held out for evaluation (at most)."""
    limit: int | None = Field(None, ge=1)
    """Use only this many training prompts, a seeded choice."""
    max_tokens: int = Field(64, ge=1)
    """Longer prompts are handled as ``over_long`` says."""
    over_long: Literal["truncate", "skip", "fail"] = "truncate"
    """Keep the last ``max_tokens`` tokens, leave the prompt out (both counted and said), or stop."""

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


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts, split."""

    train: tuple[Prompt, ...]
    evaluation: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()
    """What a person should know: prompts truncated or skipped."""


_JSON_LINES = (".jsonl", ".ndjson", ".json")
_TRAINED_ON = (None, "", "train")
_HELD_OUT = ("eval", "validation")
"""What ``split`` may say of a row; None is a row that has none."""


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    text: str
    split: str | None
    metadata: Mapping[str, Json]


def load_prompts(
    config: PromptConfig, tokenizer: Tokenizer, *, seed: int, add_special_tokens: bool = True
) -> PromptSet:
    """Read, check, split and tokenize.

    Raises:
        FileNotFoundError: no such file.
        DataError: a row that is no prompt, or no prompts at all.
    """
    rows = list(_read(config.source, config.field, config.where, said_by="prompts.source"))
    if not rows and config.where is not None:
        raise DataError(f"{config.source}: no row fits prompts.where = {config.where!r}")
    train_rows = [row for row in rows if row.split in _TRAINED_ON]
    held_out_rows = [row for row in rows if row.split in _HELD_OUT]
    if config.evaluation_source is not None:
        evaluation_rows = list(
            _read(
                config.evaluation_source,
                config.field,
                config.where,
                said_by="prompts.evaluation_source",
            )
        )
    elif held_out_rows:
        evaluation_rows = held_out_rows
    else:
        order = np.random.default_rng(seed).permutation(len(train_rows))
        count = min(config.num_evaluation, len(train_rows) // 2)
        held_out = set(order[:count].tolist())
        evaluation_rows = [row for i, row in enumerate(train_rows) if i in held_out]
        train_rows = [row for i, row in enumerate(train_rows) if i not in held_out]
    evaluation_rows = evaluation_rows[: config.num_evaluation]
    if config.limit is not None and config.limit < len(train_rows):
        chosen = np.random.default_rng(seed + 1).permutation(len(train_rows))[: config.limit]
        train_rows = [train_rows[i] for i in sorted(chosen.tolist())]
    notes = _left_out(rows)
    train = _tokenize(train_rows, config, tokenizer, notes, add_special_tokens=add_special_tokens)
    evaluation = _tokenize(
        evaluation_rows, config, tokenizer, notes, add_special_tokens=add_special_tokens
    )
    if not train or not evaluation:
        raise DataError(
            f"{config.source}: {_prompts(len(train))} to train and {len(evaluation)} to evaluate on; "
            "both are needed (at least two prompts, or an evaluation_source)"
            + "".join(f". {note}" for note in notes)
        )
    return PromptSet(train=train, evaluation=evaluation, notes=tuple(notes))


def read_prompts(
    source: str, field: str, tokenizer: Tokenizer, *, said_by: str
) -> tuple[Prompt, ...]:
    """Every prompt of a file, whole and in its order, whatever ``split`` says.

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
        raise DataError(f"{source}: there are no prompts in it")
    whole = PromptConfig(max_tokens=sys.maxsize)
    return _tokenize(rows, whole, tokenizer, [], add_special_tokens=True)


def _left_out(rows: list[_Row]) -> list[str]:
    """Says which rows belong to neither part: a test set must not be learnt from, and is not for tuning."""
    others = Counter(row.split for row in rows if row.split not in (*_TRAINED_ON, *_HELD_OUT))
    return [
        f"{_prompts(count)} with split = {split!r} left out: rows with train, or without a split, are trained "
        "on, those with eval or validation are held out"
        for split, count in others.items()
    ]


def _prompts(count: int) -> str:
    return "1 prompt" if count == 1 else f"{count:,} prompts"


def _tokenize(
    rows: list[_Row],
    config: PromptConfig,
    tokenizer: Tokenizer,
    notes: list[str],
    *,
    add_special_tokens: bool,
) -> tuple[Prompt, ...]:
    prompts: list[Prompt] = []
    over_long = 0
    for row in rows:
        ids = tokenizer.encode(row.text, add_special_tokens=add_special_tokens)
        if not ids:
            raise DataError(f"{row.place}: the prompt {row.text[:40]!r} has no tokens")
        text = row.text
        if len(ids) > config.max_tokens:
            over_long += 1
            if config.over_long == "fail":
                raise DataError(
                    f"{row.place}: the prompt has {len(ids)} tokens, prompts.max_tokens is "
                    f"{config.max_tokens}: raise it, or set prompts.over_long"
                )
            if config.over_long == "skip":
                continue
            ids = ids[-config.max_tokens :]
            text = tokenizer.decode(ids, skip_special_tokens=True)
        prompts.append(
            Prompt(index=len(prompts), text=text, token_ids=tuple(ids), metadata=row.metadata)
        )
    if over_long:
        what = "cut to the last" if config.over_long == "truncate" else "left out: over"
        tokens = f"{config.max_tokens} token" + ("" if config.max_tokens == 1 else "s")
        notes.append(f"{_prompts(over_long)} {what} {tokens}")
    return tuple(prompts)


def check_sources(config: PromptConfig) -> None:
    """Check that the files with prompts are there, without reading them.

    Raises:
        FileNotFoundError: one is not.
        DataError: one is not a file of prompts, by its name.
    """
    for said_by, source in (
        ("prompts.source", config.source),
        ("prompts.evaluation_source", config.evaluation_source),
    ):
        if source is not None:
            _path_of(source, config.where, said_by=said_by)


def _path_of(source: str, where: str | None, *, said_by: str) -> Path:
    if source.startswith("embedded:"):
        path = asset_path("prompts", source.removeprefix("embedded:")).with_suffix(".jsonl")
    else:
        path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no prompt file {path.absolute()}: check {said_by}")
    if not path.is_file():
        raise DataError(f"{path} is not a file: {said_by} names a .jsonl, .txt or .parquet file")
    suffix = path.suffix.lower()
    if suffix == ".txt" and where is not None:
        raise DataError(f"{path}: lines of text have no numbers for prompts.where: unset it")
    if suffix not in (*_JSON_LINES, ".txt", ".parquet"):
        raise DataError(f"{path}: prompts come from .jsonl, .txt or .parquet files, not {suffix!r}")
    return path


def _read(source: str, field: str, where: str | None, *, said_by: str) -> Iterator[_Row]:
    path = _path_of(source, where, said_by=said_by)
    fits = _everything if where is None else _condition(where)
    match path.suffix.lower():
        case ".txt":
            for number, line in text_lines(path):
                yield _row(f"{path}:{number}", line, None, {})
        case ".parquet":
            yield from _read_parquet(path, field, fits)
        case _:
            yield from _read_jsonl(path, field, fits)


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


def _read_jsonl(path: Path, field: str, fits: _Condition) -> Iterator[_Row]:
    for number, line in text_lines(path):
        place = f"{path}:{number}"
        try:
            record = parse_json(line, object_pairs_hook=_no_duplicates)
        except (ValueError, DataError) as err:
            raise DataError(f"{place}: {err}") from err
        if not isinstance(record, dict):
            raise DataError(f"{place}: not a JSON object but a {type(record).__name__}")
        if fits(record):
            yield _record_row(place, record, field)


def _read_parquet(path: Path, field: str, fits: _Condition) -> Iterator[_Row]:
    records = (record for frame in parquet_frames(path) for record in frame.iter_rows(named=True))
    for number, record in enumerate(records, start=1):
        if fits(record):
            yield _record_row(f"{path}: row {number}", record, field)


_Condition: TypeAlias = Callable[[Mapping[str, Json]], bool]
"""Whether a record is one of those to be used."""
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
    """Whether the number that ``where`` names is in a record and compares as it says.

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
    if field not in record:
        known = ", ".join(sorted(record)) or "none"
        raise DataError(f"{place}: no field {field!r} (it has: {known}); set prompts.field")
    value = record[field]
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
                f"{place}: {key!a} is {str(item)[:40]!a}, which JSON cannot say, and so no pool can keep: leave it out"
            )
    return _row(place, value, split if isinstance(split, str) else None, metadata)


def _is_json(item: Json) -> bool:
    """Whether a plain value is one of every JSON: a number that floats can hold, a text without half characters."""
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
