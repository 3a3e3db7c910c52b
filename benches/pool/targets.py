"""The pool's targets: ratios to named peers in the same run, fractions of the measured limits."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from pool import tasks as t
from pool.quark_peer import RAW_BYTES_BESIDE_TOKENS

COMPLETION_TOKENS = 20
"""On average."""


class Results:
    """Medians by size, task and peer, with the limits."""

    def __init__(self, by_size: dict[int, t.Times], limits: dict[str, float]) -> None:
        self.by_size = by_size
        self.limits = limits

    @property
    def sizes(self) -> list[int]:
        return sorted(self.by_size)

    def median(self, size: int, task: str, peer: str) -> float | None:
        """Seconds or bytes; None where it was not measured."""
        figures = self.by_size.get(size, {}).get(task, {}).get(peer)
        return statistics.median(figures) if figures else None

    def ratio(self, size: int, task: str, peer: str) -> float | None:
        """Peer / quark: above 1 quark is better."""
        return quotient(self.median(size, task, peer), self.median(size, task, "quark"))


def quotient(a: float | None, b: float | None) -> float | None:
    """a / b, None where either is missing or nothing."""
    return None if a is None or not b else a / b


Figure = Callable[[Results, int], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One promise: a figure, and from where on it is met."""

    what: str
    figure: Figure
    least: float | None = None
    most: float | None = None
    sizes: tuple[int, ...] = ()
    """Where it is promised; empty: everywhere."""

    @property
    def bound(self) -> str:
        return f"≥ {self.least:,g}" if self.least is not None else f"≤ {self.most:,g}"

    def is_met(self, value: float) -> bool:
        """Whether a figure keeps the promise."""
        if self.least is not None:
            return value >= self.least
        return self.most is not None and value <= self.most


def faster(task: str, peer: str, least: float, *sizes: int) -> Target:
    """Quark is so many times as fast (or small) as a peer."""
    return Target(
        what=f"{task}: {peer} / quark",
        figure=lambda results, size: results.ratio(size, task, peer),
        least=least,
        sizes=sizes,
    )


def growth(task: str, begin: int, most: float) -> Target:
    """Quark's time has grown at most so much since a smaller pool."""
    return Target(
        what=f"{task}: quark, N against {begin:,}",
        figure=lambda results, size: (
            quotient(results.median(size, task, "quark"), results.median(begin, task, "quark"))
            if size > begin
            else None
        ),
        most=most,
    )


def raw_ratio(results: Results, size: int) -> float | None:
    """Bytes on disk against the raw size of what quark stores, where tokens are at full length."""
    if size > t.FULL_SIZE:
        return None
    raw = RAW_BYTES_BESIDE_TOKENS + 2 * COMPLETION_TOKENS
    return quotient(results.median(size, t.BYTES, "quark"), raw)


def memory_in_mib(results: Results, size: int) -> float | None:
    """Anonymous memory that opening and sampling add."""
    return quotient(results.median(size, t.MEMORY, "quark"), 1 << 20)


TEN_MILLION, HUNDRED_MILLION = 10_000_000, 100_000_000

TARGETS = (
    faster(t.APPEND, "numpy", 1.3),
    *(faster(t.APPEND, peer, 10) for peer in ("lmdb", "duckdb", "sqlite")),
    faster(t.APPEND, "lance", 5),
    faster(t.APPEND, t.LIMIT, 0.55),
    growth(t.APPEND, 100_000, 1.2),
    faster(t.ROUND_TASK, "lists", 1_000, 1_000_000),
    faster(t.ROUND_TASK, "lists", 15_000, TEN_MILLION),
    faster(t.OPEN_WARM, "numpy", 2, TEN_MILLION),
    faster(t.OPEN_WARM, "lmdb", 2, TEN_MILLION),
    growth(t.OPEN_WARM, 100_000, 1.5),
    faster(t.OPEN_EVICTED, "numpy-madvise", 2, TEN_MILLION),
    faster(t.OPEN_EVICTED, "lmdb", 2.5, TEN_MILLION),
    faster(t.OPEN_EVICTED, "numpy", 40, TEN_MILLION),
    faster(t.NEXT_EVICTED, "numpy", 1, TEN_MILLION),
    faster(t.REQUANTIZE, "numpy", 1, 100_000),
    faster(t.REQUANTIZE, "numpy", 5, 1_000_000),
    faster(t.REQUANTIZE, "numpy", 40, TEN_MILLION),
    faster(t.REQUANTIZE, "numpy", 300, HUNDRED_MILLION),
    growth(t.REQUANTIZE, 1_000_000, 4),
    faster(t.LABELS, "numpy", 6, TEN_MILLION),
    faster(t.LABELS, "numpy", 8, HUNDRED_MILLION),
    faster(t.LABELS, "numpy argsort", 50, TEN_MILLION),
    faster(t.LABELS, "duckdb", 150, HUNDRED_MILLION),
    faster(t.LABELS, "polars", 150, HUNDRED_MILLION),
    faster(t.LABELS, t.LIMIT, 0.5),
    *(
        faster(t.LARGE, peer, least)
        for peer, least in (
            ("padded", 2.5),
            ("numpy", 10),
            ("torchrl", 10),
            ("lmdb", 25),
            ("datasets", 70),
            ("lance", 150),
        )
    ),
    faster(t.LARGE, t.LIMIT, 0.18),
    *(
        faster(t.SMALL, peer, least)
        for peer, least in (
            ("padded", 2.2),
            ("numpy", 9),
            ("torchrl", 18),
            ("datasets", 45),
        )
    ),
    Target(what=f"{t.BYTES}: quark / raw size of its columns", figure=raw_ratio, most=1.1),
    faster(t.BYTES, "numpy", 1 / 0.9),
    faster(t.BYTES, "torchrl", 1 / 0.37),
    Target(
        what=f"{t.MEMORY}, MiB",
        figure=memory_in_mib,
        most=32,
        sizes=(100_000, 1_000_000, TEN_MILLION),
    ),
    Target(what=f"{t.MEMORY}, MiB", figure=memory_in_mib, most=64, sizes=(HUNDRED_MILLION,)),
    faster(t.MEMORY, "lists", 100),
)
