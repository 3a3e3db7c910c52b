"""Converts arguments for the extension, or raises an error that names the argument."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Number = TypeVar("_Number", bound=np.generic)
_Rule = TypeVar("_Rule", bound=StrEnum)


def as_vector(name: str, values: ArrayLike, dtype: type[_Number]) -> NDArray[_Number]:
    """``values`` as a contiguous vector of ``dtype``. Raises ValueError if the conversion would change a value."""
    given = np.asarray(values)
    if given.ndim != 1:
        raise ValueError(f"{name} has {given.ndim} dimensions; it must be a vector")
    if given.dtype == dtype:
        return np.ascontiguousarray(given)
    is_float = np.issubdtype(dtype, np.floating)
    if given.size and given.dtype.kind not in ("iuf" if is_float else "iu"):
        raise ValueError(f"{name} has the type {given.dtype}; it must be {np.dtype(dtype)}")
    with np.errstate(all="ignore"):
        converted = np.ascontiguousarray(given.astype(dtype))
    # A float column may round to float32. An integer must not change, and a finite number must stay finite.
    is_kept = (
        np.array_equal(np.isinf(converted), np.isinf(given))
        if is_float
        else np.array_equal(converted, given)
    )
    if not is_kept:
        raise ValueError(f"{name} holds values that do not fit into {np.dtype(dtype)}")
    return converted


def as_rule(name: str, value: str, rules: type[_Rule]) -> _Rule:
    """``value`` as one of ``rules``. Raises ValueError with the valid names."""
    try:
        return rules(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}; there are {', '.join(rules)}") from None


def bounded(name: str, value: int, bits: int) -> int:
    """``value``. Raises ValueError if it does not fit into this many bits."""
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} is {value}; it must be at least 0 and below 2**{bits}")
    return value
