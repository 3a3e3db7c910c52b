"""The numbers behind draws and ties, as the specification makes them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quark.pool.scrambling import mix64, permute, scramble

WORD = st.integers(0, 2**64 - 1)


def test_mixing_a_golden_counter_is_splitmix64() -> None:
    # The first outputs for seed 0 of the generator of Steele, Lea and Flood (2014).
    golden = 0x9E3779B97F4A7C15
    assert [mix64(golden * i % 2**64) for i in (1, 2, 3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_hashes_have_the_values_that_pools_on_disk_rely_on() -> None:
    assert scramble(0, 0) == mix64(mix64(0x9E3779B97F4A7C15))
    assert [scramble(1, 2), scramble(2, 1)] == [0x081A5C1377856B73, 0xF2826F98653E9E57]
    assert [permute(10, 7, i) for i in range(10)] == [9, 0, 8, 5, 4, 3, 6, 2, 1, 7]


@given(key=WORD, n=st.integers(1, 300))
def test_a_permutation_reaches_everything_once(key: int, n: int) -> None:
    assert sorted(permute(n, key, i) for i in range(n)) == list(range(n))


@given(key=WORD, n=st.integers(2**32, 2**64 - 1), start=WORD)
def test_a_permutation_of_more_than_two_to_the_32_stays_in_range_and_apart(
    key: int, n: int, start: int
) -> None:
    places = {(start + i * 2**31) % n for i in range(64)}
    images = {permute(n, key, place) for place in places}
    assert len(images) == len(places)
    assert max(images) < n


@pytest.mark.parametrize("n", [3, 4])
def test_every_order_of_a_few_is_as_likely(n: int) -> None:
    orders = list(itertools.permutations(range(n)))
    seen = dict.fromkeys(orders, 0)
    for key in range(150 * len(orders)):
        seen[tuple(permute(n, mix64(key), i) for i in range(n))] += 1
    # 5 times the standard deviation.
    assert np.abs(np.array(list(seen.values())) - 150).max() < 5 * 12
