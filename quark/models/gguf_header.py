"""The header of a GGUF file, checked before the file is given to the library that reads it.

The library trusts the header: a count of 2**60 keeps it busy indefinitely, and a truncated file is
read beyond its end. Here every count, length and offset is compared with the size of the file.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

from quark.errors import ModelError

MAX_ENTRIES = 1 << 16
"""Maximum number of a file's metadata entries, and of its tensors."""
MAX_TEXTS = 1 << 22
"""Maximum length of one list, such as a vocabulary."""
MAX_NAME_BYTES = 1 << 16
MAX_DIMENSIONS = 8

_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type; texts (8) and lists (9) vary."""
_TEXT, _LIST = 8, 9
_UNSIGNED = {4: "<I", 10: "<Q"}


class _UnfitError(Exception):
    """The header is invalid; the message says why."""


def check_gguf(path: Path) -> None:
    """Check that a GGUF file is whole and that no count in it exceeds what the file can hold.

    Takes memory for at most the names of one list, and time proportional to the header.

    Raises:
        ModelError: the file is truncated, damaged, or of an unsupported version; the message says what is wrong.
    """
    with path.open("rb") as file:
        try:
            _Header(file, path.stat().st_size).check()
        except _UnfitError as err:
            raise ModelError(
                f"{path} is not a whole GGUF file: {err}. Download or convert it again"
            ) from err


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def check(self) -> None:
        if self._bytes(4) != b"GGUF":
            raise _UnfitError("it does not begin with GGUF")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise _UnfitError(
                f"its version is {version}, and {_VERSIONS[0]} and {_VERSIONS[1]} are read"
            )
        num_tensors = self._count("tensors", MAX_ENTRIES)
        settings: dict[str, int] = {}
        for _ in range(self._count("metadata entries", MAX_ENTRIES)):
            key = self._name()
            kind = self._number("<I")
            if kind in _UNSIGNED:
                settings[key] = self._number(_UNSIGNED[kind])
            else:
                self._skip_value(kind, key)
        largest = self._check_tensors(num_tensors, settings.get("general.alignment", 32))
        for key, value in settings.items():
            # The library makes layers and matrices of these sizes before it looks at a tensor.
            most = {
                "block_count": num_tensors,
                "embedding_length": largest,
                "feed_forward_length": largest,
                "vocab_size": largest,
            }.get(key.rpartition(".")[2])
            if most is not None and value > most:
                raise _UnfitError(f"{key} is {value:,}, and its tensors allow {most:,} at most")

    def _check_tensors(self, count: int, alignment: int) -> int:
        """Check that the tensors lie in the file; returns the largest dimension of them."""
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        largest = end = total = 0
        for _ in range(count):
            name = self._name()
            num_dimensions = self._number("<I")
            if num_dimensions > MAX_DIMENSIONS:
                raise _UnfitError(f"tensor {name!r} has {num_dimensions:,} dimensions")
            shape = [self._number("<Q") for _ in range(num_dimensions)]
            kind, offset = self._number("<I"), self._number("<Q")
            if kind not in sizes:
                raise _UnfitError(f"tensor {name!r} has the unknown type {kind}")
            block, num_bytes = sizes[kind]
            length = -(-math.prod(shape) // block) * num_bytes
            largest, end, total = max([largest, *shape]), max(end, offset + length), total + length
        if alignment < 1 or alignment > 1 << 20:
            raise _UnfitError(f"general.alignment is {alignment:,}")
        start = -(-self._file.tell() // alignment) * alignment
        if start + max(end, total) > self._size:
            raise _UnfitError(
                f"its tensors take {start + max(end, total):,} bytes, and it has {self._size:,}"
            )
        return largest

    def _skip_value(self, kind: int, key: str) -> None:
        if kind == _TEXT:
            self._skip(self._number("<Q"))
        elif kind == _LIST:
            inner, count = self._number("<I"), self._number("<Q")
            if inner == _TEXT:
                if count > MAX_TEXTS:
                    raise _UnfitError(f"{key} has {count:,} texts, the most is {MAX_TEXTS:,}")
                for _ in range(count):
                    self._skip(self._number("<Q"))
            elif inner in _SIZES:
                self._skip(count * _SIZES[inner])
            else:
                raise _UnfitError(f"{key} is a list of the unknown type {inner}")
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise _UnfitError(f"{key} has the unknown type {kind}")

    def _count(self, what: str, most: int) -> int:
        count = self._number("<Q")
        if count > most:
            raise _UnfitError(f"it says that it has {count:,} {what}, the most is {most:,}")
        return count

    def _name(self) -> str:
        length = self._number("<Q")
        if length > MAX_NAME_BYTES:
            raise _UnfitError(f"a name in it has {length:,} bytes")
        return self._bytes(length).decode("utf-8", "replace")

    def _number(self, form: str) -> int:
        (number,) = struct.unpack(form, self._bytes(struct.calcsize(form)))
        return int(number)

    def _bytes(self, length: int) -> bytes:
        content = self._file.read(length)
        if len(content) < length:
            raise _UnfitError("it ends within its header")
        return content

    def _skip(self, length: int) -> None:
        if length > self._size - self._file.tell():
            raise _UnfitError("it ends within its header")
        self._file.seek(length, 1)
