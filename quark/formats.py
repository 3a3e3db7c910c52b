"""The version that a file says of its own layout: absent in a file of before there was one, refused where it is newer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quark.errors import QuarkError

VERSION_KEY = "format_version"


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
