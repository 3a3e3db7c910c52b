"""The picture: reward against drift, a panel for each number of scored samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reward_drift.tables import compared, hull_height
from reward_drift.task import Point


def draw(points: Sequence[Point], base: float, path: Path) -> None:
    """One panel for each budget: reward against drift, the mean hull over seeds of each method's best settings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    budgets = compared(points)
    figure, axes = plt.subplots(
        1, len(budgets), figsize=(3.4 * len(budgets), 3.6), sharey=True, squeeze=False
    )
    grid = np.linspace(0.0, 8.0, 65)
    for axis, budget in zip(axes[0], budgets, strict=True):
        for i, method in enumerate(dict.fromkeys(p.method for p in points)):
            own = [p for p in points if p.method == method]
            if method != "best-of-n":
                own = [p for p in own if p.samples <= budget]
                if not any(p.samples == budget for p in own):
                    continue
            end = max(p.kl_per_completion for p in own)
            curves = [
                np.mean(
                    [
                        [
                            hull_height(
                                [p for p in own if p.settings == s and p.seed == seed], d, base=base
                            )
                            for d in grid
                        ]
                        for seed in sorted({p.seed for p in own if p.settings == s})
                    ],
                    axis=0,
                )
                for s in ({p.settings for p in own} if method != "best-of-n" else {None})
                if s is not None
            ] or [np.array([hull_height(own, d, base=base) for d in grid])]
            height = np.max(curves, axis=0)
            shown = grid <= end
            style = "-" if method.startswith("quark") else "--"
            axis.plot(grid[shown], height[shown], style, color=f"C{i % 10}", label=method)
        axis.set_title(f"{budget:,} scored samples")
        axis.set_xlabel("nats per completion")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out reward")
    # Of all panels: a method may not have been measured at the largest budget.
    named = {
        text: h
        for axis in axes[0]
        for h, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    axes[0][-1].legend(named.values(), named.keys(), fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
