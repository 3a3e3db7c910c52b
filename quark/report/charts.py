"""The page's charts: figures in, inline SVG out.

Drawn by matplotlib's SVG backend, then made part of the page: no XML prolog, no metadata, no namespace
addresses, ids unique per chart, and the neutral colors as CSS variables so that one drawing serves
light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from quark.printable import printable
from quark.report.load import PoolView, Row, RunData, figure, number_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"
"""Stand-ins that the finished SVG names as CSS variables."""
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"}

BLUE, ORANGE, TEAL, PURPLE = "#3b7dd8", "#e0823d", "#1f9e89", "#9467bd"
_WORST, _MIDDLE, _BEST = (0xD1, 0x49, 0x5B), (0xE3, 0xB5, 0x49), (0x1F, 0x9E, 0x89)

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "quark",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.facecolor": "none",
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}
_DASHES = (0, (4, 3))
_SIZE_INCHES = (5.4, 3.0)
_LEGEND: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (-0.02, 1.0),
    "ncols": 3,
    "columnspacing": 1.2,
    "handlelength": 1.4,
    "borderaxespad": 0.2,
}
_MAX_POINTS = 400
"""Longer step series are averaged down to this many points: the page stays small."""


_MOST_LABELS = 16
"""Bars that are labelled one by one; more labels would cover each other."""


class Chart(NamedTuple):
    """A drawing and what it shows."""

    title: str
    svg: Markup
    note: str = ""
    """How to read it, where the title does not say."""


def quantile_color(index: int, num_quantiles: int) -> str:
    """Red for the lowest quantile over yellow to teal for the best, as ``#rrggbb``."""
    position = index / max(num_quantiles - 1, 1) * 2
    low, high = (_WORST, _MIDDLE) if position < 1 else (_MIDDLE, _BEST)
    share = position if position < 1 else position - 1
    return "#" + "".join(
        f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True)
    )


def reward_by_round(data: RunData) -> Chart | None:
    """Mean reward of each round's samples, of held-out prompts under the best token, and of the original."""
    best = [row for row in data.best_evaluations if math.isfinite(figure(row, "reward_mean"))]
    if not data.rounds and not best:
        return None

    def draw(axes: Axes) -> None:
        _line(axes, data.rounds, "round", "reward_mean", BLUE, "new samples", marker="o")
        _line(axes, best, "round", "reward_mean", TEAL, "held-out, best quantile", marker="s")
        baseline = figure(data.baseline, "reward_mean")
        if math.isfinite(baseline):
            axes.axhline(
                baseline, color=_MUTED, linestyle=_DASHES, linewidth=1.4, label="original model"
            )
        _whole_numbers(axes)
        axes.set_xlabel("round, from 0")
        axes.set_ylabel("mean reward")
        _legend(axes)

    return _svg("reward", "Mean reward by round", draw)


def control_curve(data: RunData) -> Chart | None:
    """Mean reward on held-out prompts by the reward token given, first and last."""
    if data.last_curve is None:
        return None
    last = _numbers(data.last_curve.get("reward_mean"))
    first = _numbers(data.control_curves[0].get("reward_mean"))
    num = len(last)
    if num == 0:
        return None

    def draw(axes: Axes) -> None:
        places = np.arange(num)
        axes.bar(places, last, width=0.66, color=[quantile_color(i, num) for i in range(num)])
        for place, value in zip(places, last, strict=True):
            if math.isfinite(value) and num <= _MOST_LABELS:
                axes.annotate(
                    f"{value:.2f}",
                    (place, value),
                    xytext=(0, 3 if value >= 0 else -11),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                )
        if len(data.control_curves) > 1 and len(first) == num:
            axes.plot(places, first, "_", color=_INK, markersize=20, label="first evaluation")
            _legend(axes)
        if num <= _MOST_LABELS:
            axes.set_xticks(places, [str(i) for i in range(num)])
        else:
            _whole_numbers(axes)
        axes.margins(y=0.15)
        axes.axhline(0, color=_MUTED, linewidth=0.8)
        axes.grid(visible=False, axis="x")
        ends = f" (0 worst, {num - 1} best)" if num > 1 else ""
        axes.set_xlabel("quantile asked for" + ends)
        axes.set_ylabel("mean reward")

    return _svg("control", "Mean reward by quantile: the control curve", draw)


def reward_against_drift(data: RunData) -> Chart | None:
    """What `quark frontier` measured: mean reward over drift, from no guidance to a lot of it, with intervals."""
    if data.frontier is None:
        return None
    points = [p for p in data.frontier.points if math.isfinite(p.reward.mean)]
    best = max((p.quantile for p in points if p.quantile is not None), default=None)
    curve = sorted(
        (p for p in points if p.quantile is not None and p.quantile == best),
        key=lambda point: point.guidance,
    )
    if best is None or not curve:
        return None
    others = [p for p in points if p.quantile != best]

    def draw(axes: Axes) -> None:
        drifts, rewards = ([getattr(p, k).mean for p in curve] for k in ("drift", "reward"))
        below = [p.reward.mean - p.reward.low for p in curve]
        above = [p.reward.high - p.reward.mean for p in curve]
        axes.errorbar(
            drifts,
            rewards,
            yerr=[below, above],
            fmt="-o",
            color=TEAL,
            capsize=3,
            label="best quantile",
        )
        for point in curve:
            axes.annotate(
                f"{point.guidance:g}",
                (point.drift.mean, point.reward.mean),
                xytext=(5, -12),
                textcoords="offset points",
                fontsize=9,
            )
        if others:
            axes.plot(
                [p.drift.mean for p in others],
                [p.reward.mean for p in others],
                "o",
                color=_MUTED,
                label="original and other tokens",
            )
        axes.set_xlabel("KL of what is sampled to the original, nats per completion")
        axes.set_ylabel("mean reward")
        _legend(axes)

    return _svg("frontier", "Reward against drift, by strength of guidance", draw)


def kl_by_step(data: RunData) -> Chart | None:
    """Both directions of the token-level KL between policy and original model."""
    if not data.steps:
        return None

    def draw(axes: Axes) -> None:
        _line(axes, data.steps, "step", "kl_policy_to_reference", PURPLE, "policy to original")
        _line(axes, data.steps, "step", "kl_reference_to_policy", ORANGE, "original to policy")
        _from_zero(axes)
        _whole_numbers(axes)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("KL (nats per token)")
        _legend(axes)

    return _svg("kl", "KL divergence by step, both directions", draw)


def loss_by_step(data: RunData) -> Chart | None:
    """The optimized loss, and its language-modeling part on a scale of its own."""
    if not data.steps:
        return None

    def draw(axes: Axes) -> None:
        _line(axes, data.steps, "step", "loss", BLUE, "whole loss (left)")
        _whole_numbers(axes)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("whole loss (nats)")
        right = axes.twinx()
        right.grid(visible=False)
        right.spines["right"].set_visible(True)
        _line(right, data.steps, "step", "lm_loss", ORANGE, "language modeling (right)")
        right.set_ylabel("nats per token")
        left_handles, left_labels = axes.get_legend_handles_labels()
        right_handles, right_labels = right.get_legend_handles_labels()
        axes.legend(left_handles + right_handles, left_labels + right_labels, **_LEGEND)

    return _svg("loss", "Losses by step", draw)


def information_by_step(data: RunData) -> Chart | None:
    """What the reward tokens say of the samples of each step, of each round's new ones, and of those held out."""
    if not any(math.isfinite(figure(row, "information")) for row in data.steps) and not any(
        math.isfinite(figure(row, key))
        for row in data.rounds
        for key in ("information_fresh", "information_held_out")
    ):
        return None
    # A round's new samples are measured before its first step, its held-out ones after its last.
    ends = [figure(row, "step") for row in data.rounds]
    begun = [{**row, "step": begin} for row, begin in zip(data.rounds, [0.0, *ends], strict=False)]

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=_MUTED, linestyle=_DASHES, linewidth=1.4, label="chance")
        _line(axes, data.steps, "step", "information", BLUE, "learned from")
        for rows, which, color, marker, label in (
            (begun, "fresh", ORANGE, "o", "new samples"),
            (data.rounds, "held_out", TEAL, "s", "held out"),
        ):
            _with_errors(axes, rows, which, color, marker, label)
        _whole_numbers(axes)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("information (nats)")
        axes.legend(**_LEGEND | {"ncols": 4, "columnspacing": 0.9})

    return _svg(
        "information",
        "Information between reward token and completion",
        draw,
        note="How well the tokens tell samples of different quantiles apart; at 0, not better than chance. Where the "
        "samples that were learned from rise and the others fall, the model learns them by heart. Bars: two standard "
        "errors.",
    )


def diversity_by_round(data: RunData) -> Chart | None:
    """Share of distinct n-grams in held-out completions under the best token."""
    rows = [row for row in data.best_evaluations if math.isfinite(figure(row, "distinct_2"))]
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        for key, color, label in (
            ("distinct_1", BLUE, "distinct-1"),
            ("distinct_2", TEAL, "distinct-2"),
            ("distinct_3", PURPLE, "distinct-3"),
        ):
            _line(axes, rows, "round", key, color, label, marker="o")
        axes.set_ylim(0, 1.02)
        _whole_numbers(axes)
        axes.set_xlabel("round, from 0")
        axes.set_ylabel("distinct n-grams (share)")
        _legend(axes)

    return _svg("diversity", "Diversity of held-out completions by round", draw)


def perplexity_by_round(data: RunData) -> Chart | None:
    """How likely the original model finds the held-out completions under the best token."""
    rows = [r for r in data.best_evaluations if math.isfinite(figure(r, "perplexity_reference"))]
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        _line(axes, rows, "round", "perplexity_reference", BLUE, "best quantile", marker="s")
        baseline = figure(data.baseline, "perplexity_reference")
        if math.isfinite(baseline):
            axes.axhline(
                baseline, color=_MUTED, linestyle=_DASHES, linewidth=1.4, label="original model"
            )
        _from_zero(axes)
        _whole_numbers(axes)
        axes.set_xlabel("round, from 0")
        axes.set_ylabel("perplexity")
        _legend(axes)

    return _svg("perplexity", "Perplexity under the original model by round", draw)


def control_gap_by_round(data: RunData) -> Chart | None:
    """Mean reward under the best token minus that under the lowest."""
    rows = [row for row in data.rounds if math.isfinite(figure(row, "control_gap"))]
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        _line(axes, rows, "round", "control_gap", TEAL, "best minus lowest token", marker="o")
        axes.axhline(0, color=_MUTED, linewidth=0.8)
        _whole_numbers(axes)
        axes.set_xlabel("round, from 0")
        axes.set_ylabel("difference in mean reward")

    return _svg("gap", "Control gap by round: reward of the best quantile minus the lowest", draw)


def length_by_round(data: RunData) -> Chart | None:
    """Tokens of a completion, of new samples and of held-out prompts."""
    key = "completion_length_mean"
    best = [row for row in data.best_evaluations if math.isfinite(figure(row, key))]
    if not best and not any(math.isfinite(figure(row, key)) for row in data.rounds):
        return None

    def draw(axes: Axes) -> None:
        _line(axes, data.rounds, "round", key, BLUE, "new samples", marker="o")
        _line(axes, best, "round", key, TEAL, "held-out, best quantile", marker="s")
        _from_zero(axes)
        _whole_numbers(axes)
        axes.set_xlabel("round, from 0")
        axes.set_ylabel("tokens of a completion")
        _legend(axes)

    return _svg("length", "Length of completions by round", draw)


def entropy_by_step(data: RunData) -> Chart | None:
    """Entropy of the policy on the samples of each step."""
    return _by_step(data, "entropy", "entropy (nats per token)", "Entropy of the policy by step")


def gradient_norm_by_step(data: RunData) -> Chart | None:
    """Norm of the gradient before clipping."""
    return _by_step(data, "grad_norm", "norm", "Gradient norm by step, before clipping")


def _by_step(data: RunData, key: str, label: str, title: str) -> Chart | None:
    if not any(math.isfinite(figure(row, key)) for row in data.steps):
        return None

    def draw(axes: Axes) -> None:
        _line(axes, data.steps, "step", key, PURPLE, label)
        _from_zero(axes)
        _whole_numbers(axes)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)

    return _svg(key, title, draw)


def time_by_round(data: RunData) -> Chart | None:
    """Seconds of each phase, one on the other."""
    phases = (("exploring", BLUE), ("scoring", ORANGE), ("learning", TEAL))
    if not any(math.isfinite(figure(row, "seconds_learning")) for row in data.rounds):
        return None

    def draw(axes: Axes) -> None:
        places = np.array([figure(row, "round") for row in data.rounds])
        below = np.zeros(len(places))
        for phase, color in phases:
            seconds = np.nan_to_num([figure(row, f"seconds_{phase}") for row in data.rounds])
            axes.bar(places, seconds, bottom=below, color=color, label=phase)
            below += seconds
        _whole_numbers(axes)
        axes.set_xlabel("round, from 0")
        axes.set_ylabel("seconds")
        _legend(axes)

    return _svg("time", "Time by phase and round", draw)


def reward_histogram(pool: PoolView) -> Chart | None:
    """How the pool's rewards are distributed and where the quantiles are cut."""
    scored = pool.rewards[pool.labels >= 0].astype(np.float64)
    scored = scored[np.isfinite(scored)]
    if scored.size == 0:
        return None
    num = len(pool.quantiles)

    def draw(axes: Axes) -> None:
        low, high = float(scored.min()), float(scored.max())
        if low == high:
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, 41)
        parts = [pool.rewards[pool.labels == index].astype(np.float64) for index in range(num)]
        axes.hist(
            [part[np.isfinite(part)] for part in parts],
            bins=edges.tolist(),
            stacked=True,
            color=[quantile_color(index, num) for index in range(num)],
            label=[f"quantile {index}" for index in range(num)],
        )
        for view in pool.quantiles[1:]:
            if math.isfinite(view.lower_bound):
                axes.axvline(view.lower_bound, color=_INK, linewidth=1.0, linestyle=(0, (2, 2)))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("reward")
        axes.set_ylabel("samples")
        if num <= 10:
            axes.legend(
                loc="lower center",
                bbox_to_anchor=(0.5, 1.0),
                ncols=min(num, 5),
                columnspacing=1.0,
                handlelength=0.9,
            )

    return _svg("histogram", "Rewards in the pool and the cuts between quantiles", draw)


def _line(
    axes: Axes, rows: Sequence[Row], x: str, y: str, color: str, label: str, *, marker: str = ""
) -> None:
    points = np.array([(figure(row, x), figure(row, y)) for row in rows], dtype=np.float64).reshape(
        -1, 2
    )
    points = _thinned(points[np.isfinite(points).all(axis=1)])
    if len(points):
        axes.plot(
            points[:, 0],
            points[:, 1],
            color=color,
            label=label,
            marker=marker or None,
            markersize=4.5,
        )


def _with_errors(
    axes: Axes, rows: Sequence[Row], which: str, color: str, marker: str, label: str
) -> None:
    """The information of ``which`` samples by step, with two standard errors."""
    points = np.array(
        [
            (
                figure(row, "step"),
                figure(row, f"information_{which}"),
                figure(row, f"information_error_{which}"),
            )
            for row in rows
        ],
        dtype=np.float64,
    ).reshape(-1, 3)
    points = points[np.isfinite(points[:, :2]).all(axis=1)]
    if len(points):
        axes.errorbar(
            points[:, 0],
            points[:, 1],
            yerr=2 * np.nan_to_num(points[:, 2]),
            fmt=f"-{marker}",
            color=color,
            markersize=4.5,
            capsize=2,
            elinewidth=1.0,
            label=label,
        )


def _thinned(points: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(points) <= _MAX_POINTS:
        return points
    return np.array([part.mean(axis=0) for part in np.array_split(points, _MAX_POINTS)])


def _numbers(values: object) -> list[float]:
    if not isinstance(values, list):
        return []
    return [number_in(value) for value in values]


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**_LEGEND)


def _svg(name: str, title: str, draw: Callable[[Axes], None], *, note: str = "") -> Chart:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        drawing = Figure(figsize=_SIZE_INCHES, layout="constrained")
        canvas = FigureCanvasSVG(drawing)
        draw(drawing.add_subplot())
        text = io.StringIO()
        canvas.print_svg(  # type: ignore[no-untyped-call]
            text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return Chart(title, _inline(text.getvalue(), name, title), note)


def _inline(svg: str, name: str, title: str) -> Markup:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)  # the background
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    label = escape(printable(title))
    head = f'<svg role="img" aria-labelledby="{name}-title"'
    body_start = svg.index(">") + 1
    return Markup(  # every text in it was escaped by the SVG backend or above
        head
        + svg[len("<svg") : body_start]
        + f'<title id="{name}-title">{label}</title>'
        + svg[body_start:]
    )
