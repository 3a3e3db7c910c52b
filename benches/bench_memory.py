"""Peak memory of a training step against completion length and vocabulary: `python benches/bench_memory.py`.

The steps of `bench_step.py` on a small Llama (random weights), each in a fresh process; what is measured is the
memory beyond the weights at the step's peak, gradients included. Hidden states grow with the length whoever makes
them, and the head's gradient with the vocabulary; logits over both shall not. Writes a table and a plot.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from bench_step import DTYPES, available_bytes, in_child, published_bytes
from training_step import SHAPES

STEPS = ("ours", "published")


def main() -> int:
    """Measure the grid, print it, draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-small")
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[50_000, 128_000, 256_000])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--precision", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, help="write an SVG file")
    arguments = parser.parse_args()
    found: dict[tuple[str, int, int], float] = {}
    print(
        f"MiB beyond the weights, {arguments.shape}, B = {arguments.batch}, {arguments.precision}"
    )
    print("| V | completion | ours | published | ours / published |")
    print("| --- | --- | --- | --- | --- |")
    for vocabulary in arguments.vocabularies:
        for length in arguments.lengths:
            case = {
                "shape": arguments.shape,
                "vocabulary": vocabulary,
                "batch": arguments.batch,
                "prompt": arguments.prompt,
                "completion": length,
                "precision": arguments.precision,
                "device": arguments.device,
            }
            for step in STEPS:
                if step == "published" and not fits(case):
                    continue
                result = in_child({"what": "memory", "case": case, "step": step})
                if "bytes" in result:
                    found[step, vocabulary, length] = result["bytes"] / 2**20
                else:
                    print(f"{step}, V = {vocabulary:,}, {length} tokens: {result['error']}")
            ours, published = (found.get((step, vocabulary, length)) for step in STEPS)
            print(
                f"| {vocabulary:,} | {length} | {figure(ours)} | {figure(published)} "
                f"| {ours / published:.2f} |"
                if ours and published
                else f"| {vocabulary:,} | {length} | {figure(ours)} | {figure(published)} | |",
                flush=True,
            )
    if arguments.plot:
        draw(found, arguments)
    return 0


def fits(case: dict[str, Any]) -> bool:
    """Whether the published step may be tried: it shall not take a shared machine's memory."""
    if case["device"] != "cpu":
        return True
    shape = SHAPES[case["shape"]].with_vocabulary(case["vocabulary"])
    needed = published_bytes(shape, case["batch"], case["prompt"], case["completion"])
    return needed < 0.7 * available_bytes()


def figure(value: float | None) -> str:
    return "did not fit" if value is None else f"{value:,.0f}"


def draw(found: dict[tuple[str, int, int], float], arguments: argparse.Namespace) -> None:
    mpl.rcParams["svg.hashsalt"] = "quark"
    figure_, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    colours = ("#0072b2", "#009e73", "#d55e00")
    for i, vocabulary in enumerate(arguments.vocabularies):
        for step, style in zip(STEPS, ("-o", "--x"), strict=True):
            points = [
                (length, found[step, vocabulary, length])
                for length in arguments.lengths
                if (step, vocabulary, length) in found
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=colours[i % len(colours)],
                    label=f"{step}, V = {vocabulary:,}",
                )
    axes.set_xlabel("completion length, tokens")
    axes.set_ylabel("MiB beyond the weights")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"Peak of one training step, B = {arguments.batch}", fontsize=10)
    figure_.savefig(arguments.plot, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    sys.exit(main())
