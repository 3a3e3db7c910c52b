"""The picture of over-optimization: gold and proxy reward against the distance from the original model."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np

from quark.evaluation.overoptimization import Curve
from quark.report.overopt import Overopt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GRAY = "#3b6fb6", "#d9822b", "#808080"


def picture(found: Overopt) -> str:
    """An SVG with one panel for each curve that there is.

    Raises:
        ValueError: there is none.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    curves = [
        (curve, title)
        for curve, title in ((found.best_of_n, "best of n"), (found.training, "checkpoints"))
        if curve is not None
    ]
    num_panels = len(curves) + bool(found.conditioning)
    if not num_panels:
        raise ValueError("there is no curve to draw")
    drawing = Figure(figsize=(5.2 * num_panels, 3.8), layout="constrained")
    canvas = FigureCanvasSVG(drawing)
    panels = drawing.subplots(1, num_panels, squeeze=False)[0]
    for axes, (curve, title) in zip(panels, curves, strict=False):
        _draw_curve(axes, curve, title)
    if found.conditioning:
        _draw_conditioning(panels[-1], found)
    text = io.StringIO()
    canvas.print_svg(text, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    return text.getvalue()


def _draw_curve(axes: Axes, curve: Curve, title: str) -> None:
    points = sorted(curve.points, key=lambda point: point.distance)
    distances = [point.distance for point in points]
    axes.plot(distances, [p.gold for p in points], "o", color=_BLUE, markersize=4, label="gold")
    axes.plot(distances, [p.proxy for p in points], "--", color=_ORANGE, label="proxy")
    axes.axhline(curve.base_gold, color=_GRAY, linewidth=0.8, label="original model, gold")
    fit = curve.fit
    if fit is not None:
        grid = np.linspace(max(min(distances), 0.05), max(distances), 120)
        axes.plot(grid, curve.base_gold + fit.gain(grid), color=_BLUE, label="fit")
        if fit.peak_distance is not None and not fit.is_extrapolated:
            peak = fit.peak_distance
            axes.axvline(peak.value, color=_BLUE, linewidth=0.8)
            if math.isfinite(peak.low) and math.isfinite(peak.high):
                axes.axvspan(peak.low, min(peak.high, max(distances)), color=_BLUE, alpha=0.12)
    axes.set_xlabel("distance: root of KL, nats per completion")
    axes.set_ylabel("reward")
    axes.set_title(title)
    axes.legend(fontsize=8)


def _draw_conditioning(axes: Axes, found: Overopt) -> None:
    tokens = [each.quantile for each in found.conditioning]
    axes.plot(tokens, [each.gold for each in found.conditioning], "-o", color=_BLUE, label="gold")
    axes.plot(
        tokens, [each.proxy for each in found.conditioning], "--o", color=_ORANGE, label="proxy"
    )
    axes.set_xticks(tokens)
    axes.set_xlabel("quantile")
    axes.set_ylabel("reward")
    axes.set_title("conditioning")
    axes.legend(fontsize=8)
