"""Reads the rows of a file with prompts, and checks each one.

A bad row is an error that names the file, the line and the reason. Nothing is skipped silently.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from quark.assets import asset_path
from quark.bounded_files import lines_of, parquet_frames, parse_json
from quark.csv_files import csv_rows
from quark.data.chat import MESSAGES_KEY, TOOLS_KEY, Message, messages_in, text_of_messages
from quark.data.hub_files import hub_file, is_on_hub
from quark.errors import DataError
from quark.types import Json

_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_PROMPT_BYTES = 1 << 20
"""Size of one prompt in UTF-8. A tokenizer needs about a hundred times that in memory."""
MAX_FIELDS_BYTES = 1 << 20
"""Size of a row's other fields as JSON, which is what a pool stores of a prompt."""

PROMPT_FIELD = "prompt"
"""The column that is read by default."""
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".wp_source")
_WRITING_PROMPT = re.compile(r"^\s*\[ ?[A-Za-z]+ ?\]\s*")
"""The beginning of a row of WritingPrompts, such as ``[ WP ]``."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row of a file with prompts."""

    place: str
    """File and line, for messages."""
    text: str
    split: str | None
    metadata: Mapping[str, Json]
    """The other fields, without ``split`` and without values that JSON does not have."""
    messages: tuple[Message, ...] = ()
    """The messages of a conversation; ``text`` is then their JSON."""
    tools: Json = None


def read_rows(
    source: str, field: str, where: str | None, *, said_by: str, skips_blank: bool = False
) -> Iterator[PromptRow]:
    """Read the rows of a file.

    Args:
        source: the file; see ``source_file``.
        field: the column with the prompts.
        where: a numeric condition on the record of a row; None keeps all rows.
        said_by: the setting that names the file, for messages.
        skips_blank: whether to leave out blank prompts instead of refusing them.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: a row is not a prompt, or the file is not a file of prompts.
    """
    path = path_of(source, where, said_by=said_by)
    fits = _everything if where is None else condition_of(where)
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


def source_file(source: str, *, is_offline: bool = False) -> Path:
    """The file that ``PromptConfig.source`` names. It may not exist.

    Args:
        source: the setting.
        is_offline: whether a file on the Hub must be in the cache.

    Raises:
        DataError: the file does not exist on the Hub.
    """
    if source.startswith("embedded:"):
        return asset_path("prompts", source.removeprefix("embedded:")).with_suffix(".jsonl")
    if is_on_hub(source):
        return hub_file(source, is_offline=is_offline)
    return Path(source).expanduser()


def path_of(source: str, where: str | None, *, said_by: str) -> Path:
    """The existing file of ``source``, with a suffix that can hold prompts. Raises FileNotFoundError and DataError."""
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


def _read_jsonl(
    path: Path, field: str, fits: _Condition, *, skips_blank: bool
) -> Iterator[PromptRow]:
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


def _read_parquet(
    path: Path, field: str, fits: _Condition, *, skips_blank: bool
) -> Iterator[PromptRow]:
    records = (record for frame in parquet_frames(path) for record in frame.iter_rows(named=True))
    for number, record in enumerate(records, start=1):
        if fits(record) and not (skips_blank and _is_blank(record.get(field))):
            yield _record_row(f"{path}: row {number}", record, field)


def _read_csv(
    path: Path, field: str, fits: _Condition, *, skips_blank: bool
) -> Iterator[PromptRow]:
    for number, row in enumerate(csv_rows(path), start=1):
        place = f"{path}: row {number}"
        if isinstance(row, str):
            raise DataError(f"{place}: {row}")
        numbers = {
            name: value if name in (field, "split") else _number_or_text(value)
            for name, value in row.items()
        }
        # Texts such as 007 and 1.50 are answers, too, and a number would not be what the file says.
        record = {
            name: value if str(value) == row[name] else row[name] for name, value in numbers.items()
        }
        if fits(numbers) and not (skips_blank and _is_blank(record.get(field))):
            yield _record_row(place, record, field)


def _number_or_text(value: str | None) -> Json:
    """A value of CSV, which does not distinguish numbers from texts."""
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


def condition_of(where: str) -> _Condition:
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


def _record_row(place: str, record: Mapping[str, Json], field: str) -> PromptRow:
    if field == PROMPT_FIELD and field not in record and MESSAGES_KEY in record:
        field = MESSAGES_KEY
    if field not in record:
        known = ", ".join(sorted(record)) or "none"
        raise DataError(f"{place}: no field {field!r} (it has: {known}); set prompts.field")
    value = record[field]
    messages: tuple[Message, ...] = ()
    if isinstance(value, list):
        messages = messages_in(value, place)
        value = text_of_messages(messages)
    if isinstance(value, Mapping):
        value = value.get("text")
    if not isinstance(value, str):
        raise DataError(f"{place}: {field!r} is {repr(value)[:40]}, not a text")
    split = record.get("split")
    metadata = {
        key: _without_nan(item)
        for key, item in record.items()
        if key not in (field, "split") and _is_plain(item)
    }
    if messages:
        metadata[MESSAGES_KEY] = [dict(message) for message in messages]
    _check_fields(metadata, place)
    row = _row(place, value, split if isinstance(split, str) else None, metadata)
    return replace(row, messages=messages, tools=record.get(TOOLS_KEY)) if messages else row


def _check_fields(metadata: Mapping[str, Json], place: str) -> None:
    """Check that a pool can store the other fields of a row.

    Raises:
        DataError: one has a value that JSON cannot represent, or they are too large.
    """
    for key, item in metadata.items():
        if not (_is_json(key) and _is_json(item)):
            raise DataError(
                f"{place}: {key!a} is {str(item)[:40]!a}, which JSON cannot represent and a pool cannot store: leave it out"
            )
    if (num_bytes := len(json.dumps(metadata))) > MAX_FIELDS_BYTES:
        largest = max(metadata, key=lambda key: len(json.dumps(metadata[key])))
        raise DataError(
            f"{place}: the fields beside the prompt have {num_bytes:,} bytes as JSON, the most is {MAX_FIELDS_BYTES:,}: "
            f"leave some out. The largest is {largest!a}"
        )


def _is_plain(item: object) -> bool:
    """Whether JSON has values of this kind. Dates and bytes, for example, are none."""
    if isinstance(item, Mapping):
        return all(isinstance(key, str) and _is_plain(part) for key, part in item.items())
    if isinstance(item, list | tuple):
        return all(map(_is_plain, item))
    return isinstance(item, str | int | float | bool | None)


def _without_nan(item: Json) -> Json:
    """A number that is not finite means a missing value, which JSON cannot represent."""
    if isinstance(item, Mapping):
        return {key: _without_nan(part) for key, part in item.items()}
    if isinstance(item, list | tuple):
        return [_without_nan(part) for part in item]
    return None if isinstance(item, float) and not math.isfinite(item) else item


def _is_json(item: Json) -> bool:
    """Whether a value fits every JSON: numbers that a float can hold, texts without lone surrogates."""
    if isinstance(item, Mapping):
        return all(_is_json(key) and _is_json(part) for key, part in item.items())
    if isinstance(item, list):
        return all(map(_is_json, item))
    try:
        if isinstance(item, int | float):
            return math.isfinite(item)
        str(item).encode()
    except (OverflowError, UnicodeEncodeError):
        return False
    return True


def _row(place: str, text: str, split: str | None, metadata: Mapping[str, Json]) -> PromptRow:
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
    return PromptRow(place=place, text=text, split=split, metadata=metadata)
