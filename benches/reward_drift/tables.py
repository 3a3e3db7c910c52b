"""The tables: the reward at a drift, by method and number of scored samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from reward_drift.contenders import DRIFTS
from reward_drift.task import Point


def swept(point: Point) -> str:
    """A peer's settings, or n: what tells its runs apart."""
    return "" if point.method.startswith(("quark", "X")) else f" [{point.settings}]"


def hull_height(points: Sequence[Point], drift: float, *, base: float) -> float:
    """The concave hull of ``points`` and the original model (0, ``base``) at ``drift``."""
    hull: list[tuple[float, float]] = [(0.0, base)]
    for x, y in sorted((max(0.0, p.kl_per_completion), p.reward) for p in points):
        if y <= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (x, y)) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((x, y))
    return float(np.interp(drift, *zip(*hull, strict=True)))


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / max(b[0] - a[0], 1e-12)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval (Student's t)."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    quantiles = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    t = quantiles.get(len(values), 1.96)
    return float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def compared(points: Sequence[Point]) -> list[int]:
    """The budgets at which something of quark's was measured; all where nothing was."""
    learned = [p for p in points if p.method != "best-of-n"]
    ours = [p for p in learned if p.method.startswith("quark")]
    return sorted({p.samples for p in ours or learned})


def tables(points: Sequence[Point], base: float) -> Iterator[str]:
    """Markdown tables of the reward at equal drift, one for each budget."""
    learned = [p for p in points if p.method != "best-of-n"]
    for budget in compared(points):
        yield f"\nReward at most so many nats per completion, {budget:,} scored samples\n"
        yield (
            "| method | "
            + " | ".join(f"{d:g}" for d in DRIFTS)
            + " | most | its nats | distinct-2 | CPU s |"
        )
        yield "| --- " * (len(DRIFTS) + 5) + "|"
        for method in dict.fromkeys(p.method for p in learned):
            row = _row(
                [p for p in learned if p.method == method and p.samples <= budget], budget, base
            )
            if row:
                yield f"| {method} | {row} |"
    fixed = [p for p in points if p.method == "best-of-n"]
    if fixed:
        heights = [hull_height(fixed, d, base=base) for d in DRIFTS]
        cells = " | ".join(f"{height:.3f}" for height in heights)
        yield f"\nbest-of-n (no training; n samples are scored for each answer): {cells}"


def _row(points: Sequence[Point], budget: int, base: float) -> str:
    """The cells of one method: at each drift the settings that are best in the mean over seeds."""
    if not any(p.samples == budget for p in points):
        return ""
    cells = []
    for drift in DRIFTS:
        best = max(
            (
                interval(
                    [
                        hull_height(
                            [p for p in points if p.settings == settings and p.seed == seed],
                            drift,
                            base=base,
                        )
                        for seed in sorted({p.seed for p in points if p.settings == settings})
                    ]
                )
                for settings in {p.settings for p in points}
            ),
            key=lambda pair: pair[0],
        )
        cells.append(f"{best[0]:.3f}" + ("" if math.isnan(best[1]) else f" ± {best[1]:.3f}"))
    last = [p for p in points if p.samples == budget]
    # What nothing trains is the original model without guidance: its strongest guidance is shown.
    shown = 0.0 if any(p.guidance == 0.0 for p in last) else max(p.guidance for p in last)
    last = [p for p in last if p.guidance == shown]
    by_settings = {
        settings: [p for p in last if p.settings == settings]
        for settings in {p.settings for p in last}
    }
    top = max(by_settings.values(), key=lambda some: float(np.mean([p.reward for p in some])))
    for name, form in (
        ("reward", ".3f"),
        ("kl_per_completion", ".1f"),
        ("distinct_2", ".2f"),
        ("cpu_seconds", ".0f"),
    ):
        cells.append(format(float(np.mean([getattr(p, name) for p in top])), form))
    return " | ".join(cells)
