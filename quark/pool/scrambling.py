"""The hash and the permutation of the pool in plain Python, equal to ``quark_pool_rs/src/rng.rs``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


def mix64(z: int) -> int:
    """The finalizer of splitmix64: a bijection of 64 bits."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def scramble(seed: int, value: int) -> int:
    """A hash of ``value`` (modulo 2**64) under ``seed``; bijective in ``value``."""
    return mix64(mix64((seed + 0x9E3779B97F4A7C15) & _MASK) ^ (value & _MASK))


def permute(n: int, key: int, i: int) -> int:
    """Where ``i`` goes in the keyed permutation of 0 .. n-1: a Feistel network walked into the range."""
    bits = max((n - 1).bit_length(), 6)
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        low, high = i & low_mask, i >> low_bits
        for number in range(0, 6, 2):
            low ^= scramble((key + number) & _MASK, high) & low_mask
            high ^= scramble((key + number + 1) & _MASK, low) & high_mask
        i = high << low_bits | low
        if i < n:
            return i


def scramble_all(seed: int, values: NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    """[N] ``scramble(seed, value)`` of each value, computed together."""
    key = np.array([(seed + 0x9E3779B97F4A7C15) & _MASK], dtype=np.uint64)
    return _mix64_all(_mix64_all(key) ^ values.astype(np.uint64))


def _mix64_all(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
