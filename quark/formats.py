"""The format version of quark's files, and checked access to their JSON values.

A file without a version is of the first one, and a newer one is refused. The readers of values raise ValueError for
another kind of value, with the beginning of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from quark.errors import QuarkError
from quark.types import Json

VERSION_KEY = "format_version"
_MAX_DEPTH = 64
T = TypeVar("T")


def check_version(
    said: Mapping[str, object], path: Path, *, newest: int, error: type[QuarkError]
) -> None:
    """Refuse a file of a newer quark.

    Args:
        said: what the file says; without a version it is of the first one.
        path: of the file.
        newest: version that this quark writes, and the last that it reads.
        error: what is raised.

    Raises:
        QuarkError: of the class ``error``, for a newer version.
        ValueError: the version is no positive whole number.
    """
    version = said.get(VERSION_KEY, 1)
    if type(version) is not int or version < 1:
        raise ValueError(f"{VERSION_KEY} is {str(version)[:40]!r}, which is no version")
    if version > newest:
        raise error(
            f"{path} was written by a newer quark: it has format {version}, and this quark reads formats up to {newest}. "
            "Update quark, or use the version that wrote it"
        )


def object_in(value: Json) -> dict[str, Json]:
    """``value``, which is a JSON object."""
    if not isinstance(value, dict):
        raise _unfit(value, "an object")
    return value


def list_in(value: Json) -> list[Json]:
    """``value``, which is a list."""
    if not isinstance(value, list):
        raise _unfit(value, "a list")
    return value


def text_in(value: Json) -> str:
    """``value``, which is a text."""
    if not isinstance(value, str):
        raise _unfit(value, "a text")
    return value


def truth_in(value: Json) -> bool:
    """``value``, which is true or false."""
    if not isinstance(value, bool):
        raise _unfit(value, "true or false")
    return value


def whole_in(value: Json) -> int:
    """``value``, which is a whole number of at least 0 that 63 bits hold."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise _unfit(value, "a whole number")
    return value


def number_in(value: Json) -> float:
    """``value``, which is a number; NaN and infinities are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unfit(value, "a number")
    try:
        return float(value)
    except OverflowError as err:
        raise _unfit(value, "a number that a float can hold") from err


def optional(read: Callable[[Json], T], value: Json) -> T | None:
    """``value`` as ``read`` takes it, or null."""
    return None if value is None else read(value)


def by_name(read: Callable[[Json], T], value: Json) -> dict[str, T]:
    """A JSON object whose every value is one for ``read``."""
    return {name: read(item) for name, item in object_in(value).items()}


def plain_json(value: object, *, max_depth: int = _MAX_DEPTH) -> Json:
    """A value of any type as JSON that a pool keeps.

    Arrays become lists, and values of other types their text. Numbers that are not finite become null, whole numbers
    beyond 64 bits their text, and half of a character a question mark.

    Raises:
        ValueError: it is nested more than ``max_depth`` levels deep.
    """
    if max_depth < 0:
        raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
    match value:
        case bool() | None:
            return value
        case str():
            return _whole_characters(value)
        case int():
            return int(value) if -(1 << 63) <= value < 1 << 64 else str(value)
        case float():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            return {
                _whole_characters(str(name)): plain_json(inner, max_depth=max_depth - 1)
                for name, inner in value.items()
            }
        case list() | tuple():
            return [plain_json(inner, max_depth=max_depth - 1) for inner in value]
    if callable(to_list := getattr(value, "tolist", None)):  # of NumPy and torch
        return plain_json(to_list(), max_depth=max_depth - 1)
    return _whole_characters(str(value))


def _whole_characters(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _unfit(value: Json, needed: str) -> ValueError:
    return ValueError(f"{repr(value)[:40]} stands where {needed} is needed")
