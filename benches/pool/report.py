"""Figures out: Markdown tables, JSON, and a drawing of how each cost grows."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from pool import tasks as t
from pool.peers import MODULES
from pool.targets import TARGETS, Results

TASKS = (
    t.APPEND,
    t.REQUANTIZE,
    t.ROUND_TASK,
    t.LABELS,
    t.SMALL,
    t.LARGE,
    t.OPEN_WARM,
    t.OPEN_EVICTED,
    t.NEXT_EVICTED,
    t.BYTES,
    t.MEMORY,
)
_PACKAGES = (
    "numpy",
    "polars",
    "duckdb",
    "lmdb",
    "pylance",
    "datasets",
    "torch",
    "torchrl",
    "pyarrow",
)


def facts() -> dict[str, object]:
    """Date, machine and versions."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": platform.platform(),
        "versions": versions,
    }


def print_limits(limits: dict[str, float]) -> None:
    """The machine's limits as a table."""
    print("\n| limit of the machine | measured |\n| --- | --- |")
    for name, value in limits.items():
        what, unit = name.rsplit(", ", 1)
        print(f"| {what} | {value:.1f} {unit} |")


def print_size(results: Results, size: int) -> None:
    """One table: quark's own figures, then peer / quark."""
    measured = [task for task in TASKS if results.median(size, task, "quark") is not None]
    found = {peer for task in measured for peer in results.by_size[size][task]}
    rank = [*MODULES, t.LIMIT]
    peers = sorted(found - {"quark"}, key=lambda peer: (rank.index(peer.split()[0]), peer))
    print(f"\nN = {size:,}; quark's own figures, then peer / quark: above 1 quark is better\n")
    print("| | " + " | ".join(measured) + " |")
    print("| --- " * (len(measured) + 1) + "|")
    own = [figure(task, results.median(size, task, "quark")) for task in measured]
    print("| **quark** | " + " | ".join(own) + " |")
    for peer in peers:
        ratios = [short(results.ratio(size, task, peer)) for task in measured]
        print(f"| {peer} | " + " | ".join(ratios) + " |")


def print_targets(results: Results) -> None:
    """Each target: its bound, and at each size whether it is met."""
    sizes = results.sizes
    print("\n| target | bound | " + " | ".join(f"N = {size:,}" for size in sizes) + " |")
    print("| --- " * (len(sizes) + 2) + "|")
    num_met = num_judged = 0
    for target in TARGETS:
        cells = []
        for size in sizes:
            value = target.figure(results, size)
            if value is None or (target.sizes and size not in target.sizes):
                cells.append("–")
                continue
            num_judged += 1
            num_met += target.is_met(value)
            cells.append(f"{short(value)} {'met' if target.is_met(value) else '**not met**'}")
        if any(cell != "–" for cell in cells):
            print(f"| {target.what} | {target.bound} | " + " | ".join(cells) + " |")
    print(f"\n{num_met} of {num_judged} met.")


def figure(task: str, value: float | None) -> str:
    """A median with its unit."""
    if value is None:
        return "–"
    if task == t.BYTES:
        return f"{value:.0f} B"
    if task == t.MEMORY:
        return f"{value / (1 << 10):,.0f} KiB"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def short(value: float | None) -> str:
    """A ratio with two or three digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def write_json(path: Path, results: Results) -> None:
    """Everything, each repetition included."""
    content = {
        **facts(),
        "command": sys.argv[1:],
        "limits": results.limits,
        "sizes": {str(size): results.by_size[size] for size in results.sizes},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(paths: Sequence[Path]) -> Results:
    """What several runs wrote, of different sizes; a size that two have measured is the later one's."""
    by_size: dict[int, t.Times] = {}
    limits: dict[str, float] = {}
    for path in paths:
        content = json.loads(path.read_text("utf-8"))
        by_size |= {int(size): times for size, times in content["sizes"].items()}
        limits = content["limits"]
    return Results(by_size, limits)


def print_growth(results: Results) -> None:
    """Quark's own figures, a line per size."""
    print(f"| N | {' | '.join(TASKS)} |")
    print("| --- |" + " --- |" * len(TASKS))
    for size in results.sizes:
        figures = [figure(task, results.median(size, task, "quark")) for task in TASKS]
        print(f"| {size:,} | {' | '.join(figures)} |")


def draw(path: Path, results: Results) -> None:
    """One panel per task: the cost against the number of samples, a line per peer, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    tasks = [task for task in TASKS if task not in (t.ROUND_TASK, t.NEXT_EVICTED)]
    style = {"svg.hashsalt": "quark", "font.size": 9, "axes.spines.top": False}
    with plt.rc_context({**style, "axes.spines.right": False, "axes.grid": True}):
        drawing, axes = plt.subplots(3, math.ceil(len(tasks) / 3), figsize=(11, 8.5))
        colours = dict(zip(MODULES, plt.get_cmap("tab20").colors, strict=False))
        for axis, task in zip(axes.flat, tasks, strict=False):
            axis.set_title(task + ("" if task in (t.BYTES, t.MEMORY) else ", s"), loc="left")
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            for peer in MODULES:
                medians = [(size, results.median(size, task, peer)) for size in results.sizes]
                points = [(size, value) for size, value in medians if value]
                if points:
                    is_ours = peer == "quark"
                    axis.plot(
                        *zip(*points, strict=True),
                        marker="o",
                        markersize=4 if is_ours else 3,
                        linewidth=2.8 if is_ours else 1.2,
                        color="#1f9e89" if is_ours else colours[peer],
                        zorder=3 if is_ours else 2,
                        label=peer,
                    )
        labelled = {
            label: line
            for axis in axes.flat
            for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        drawing.legend(
            labelled.values(), labelled.keys(), loc="lower center", ncols=6, frameon=False
        )
        drawing.supxlabel("samples in the pool", y=0.075, fontsize=9)
        drawing.tight_layout(rect=(0, 0.09, 1, 1))
        drawing.savefig(path, metadata={"Date": None})
        plt.close(drawing)
