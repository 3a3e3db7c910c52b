"""The companion methods against plain quark on the embedded model: `python benches/companions.py`.

The setting has a known fault. Texts of the original model are labeled by the embedded sentiment scorer, the *gold*
reward. A quarter of the labels is flipped, and five linear scorers learn from what is left: the *proxies*. Every run
learns from proxies, and is measured by the gold reward at each evaluation. More of a proxy is then not always more of
the truth.

Each row is a whole `quark train` run (a subprocess), that differs from the others in what its name says:

    one proxy              plain quark on the first proxy
    elastic reset          the same, reset to its average every four rounds
    average sampled        the same, sampled and measured with average weights
    mean, worst, uwo, robust   plain quark on the ensemble of all proxies
    gold                   plain quark on the gold reward itself: what a perfect proxy would give

Prints, for each, reward, gold, drift (nats per completion), distinct-2 and perplexity at the end, the best gold reward
of all evaluations, and the best gold reward within fixed drifts, as mean and spread over the seeds. Writes
`companions.json` and `companions.svg` into the folder of the runs. Eight methods, three seeds and twelve rounds take
about twenty minutes of one idle core; `--quick` takes one seed and four methods, and `--only` chooses.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from quark.config.load import load_config
from quark.generation.transformers_generator import TransformersGenerator
from quark.rewards.build import build_reward
from quark.rewards.config import RewardConfig
from quark.rewards.ensemble_training import train_linear_ensemble
from quark.training.factories import prompts_of, untrained_policy, use_threads

NUM_TEXTS = 1200
"""Labeled texts that the proxies learn from, a tenth of them held out."""
NUM_MEMBERS = 5
LABEL_NOISE = 0.25
DRIFTS = (2.0, 3.0, 4.0, 5.0, 6.0)
"""Nats per completion at which gold rewards are compared."""
COMMON = (
    "optimizer.schedule=constant",
    "pool.gold=sentiment",
    "pool.extra_scores=[]",
    "evaluation.every_rounds=1",
    "evaluation.judges=[]",
    "evaluation.control_curve=false",
    "evaluation.control_gap=false",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One evaluation under the best token."""

    step: int
    reward: float
    gold: float
    drift: float
    distinct_2: float
    perplexity: float


def write_labels(path: Path) -> None:
    """Texts of the original model with the gold reward's labels: 1 for those above the median."""
    config = load_config("demo", ("run.num_threads=1",)).config
    use_threads(config)
    device = torch.device("cpu")
    policy = untrained_policy(config, device)
    prompts = prompts_of(config).train
    wanted = [prompts[i % len(prompts)] for i in range(NUM_TEXTS)]
    generator = TransformersGenerator(
        policy.causal, policy.tokenizer, policy.reward_tokens, config.sampling, device
    )
    texts = [c.text for c in generator.generate(wanted, quantile=None, seed=11)]
    gold = build_reward(RewardConfig(name="sentiment"))
    scores = np.array(gold(prompts=[""] * len(texts), completions=texts), dtype=np.float64)
    rows = [
        {"text": text, "label": int(score > np.median(scores))}
        for text, score in zip(texts, scores, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def methods(scorers: Path) -> dict[str, tuple[str, ...]]:
    """By name, what a run sets."""
    one = (f"reward.name={scorers}/1/",)
    members = json.dumps([f"{scorers}/{n}/" for n in range(1, NUM_MEMBERS + 1)])
    several = ("reward.name=ensemble", f"reward.members={members}")
    return {
        "one proxy": one,
        "elastic reset": (*one, "average.reset_every_rounds=4", "average.init_weight_at_reset=0.3"),
        "average sampled": (*one, "average.samples=ema", "average.decay=0.8"),
        "mean": several,
        "worst": (*several, "combiner.rule=worst"),
        "uwo": (*several, "combiner.rule=uwo", "combiner.penalty=0.5"),
        "robust": (*several, "combiner.rule=robust", "combiner.softness=0.5"),
        "gold": ("reward.name=sentiment",),
    }


QUICK = ("one proxy", "elastic reset", "mean", "worst")


def train(folder: Path, settings: Sequence[str]) -> list[Point]:
    """A whole run, and its evaluations under the best token; a finished run is read again."""
    command = [sys.executable, "-m", "quark", "train", "demo", "--json", "--run-dir", str(folder)]
    for setting in (*COMMON, *settings):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{folder.name}: exit {done.returncode}\n{done.stderr[-4000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        Point(
            step=row["step"],
            reward=row["reward_mean"],
            gold=row["judges"]["gold"],
            drift=row["kl_sampled_per_completion"],
            distinct_2=row["distinct_2"],
            perplexity=row["perplexity_reference"],
        )
        for row in rows
        if row["event"] == "evaluation" and row["quantile"] is not None
    ]


def best_within(points: Sequence[Point], drift: float) -> float:
    """The highest gold reward with at most this drift; NaN where no evaluation has so little."""
    return max((p.gold for p in points if p.drift <= drift), default=math.nan)


def spread(values: Sequence[float]) -> str:
    """Mean over the seeds, and half of their range."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "-"
    half = (max(known) - min(known)) / 2
    return f"{np.mean(known):.3f}" + (f" ± {half:.3f}" if len(known) > 1 else "")


def table(found: dict[str, list[list[Point]]]) -> str:
    """Markdown; one row for each method."""
    titles = [
        "method",
        "reward",
        "gold",
        "drift",
        "distinct-2",
        "perplexity",
        "best gold",
        *(f"gold within {drift:g}" for drift in DRIFTS),
    ]
    lines = ["| " + " | ".join(titles) + " |", "| " + " | ".join("---" for _ in titles) + " |"]
    for method, runs in found.items():
        ends = [points[-1] for points in runs]
        cells = [
            method,
            *(
                spread([getattr(end, key) for end in ends])
                for key in ("reward", "gold", "drift", "distinct_2", "perplexity")
            ),
            spread([max(p.gold for p in points) for points in runs]),
            *(spread([best_within(points, drift) for points in runs]) for drift in DRIFTS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[str, list[list[Point]]], path: Path) -> None:
    """Gold reward against drift, one line for each run."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    canvas = FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for place, (method, runs) in enumerate(found.items()):
        for number, points in enumerate(runs):
            axes.plot(
                [p.drift for p in points],
                [p.gold for p in points],
                "-o",
                color=f"C{place}",
                markersize=3,
                linewidth=1,
                label=method if number == 0 else None,
            )
    axes.set_xlabel("KL of what is sampled to the original, nats per completion")
    axes.set_ylabel("gold reward on held-out prompts")
    axes.legend(fontsize=8)
    canvas.print_svg(path)


def main() -> None:
    """Train the proxies, run every method with every seed, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs; what is there is resumed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help=f"one seed of {', '.join(QUICK)}")
    parser.add_argument("--only", help="names of methods, with commas between them")
    options = parser.parse_args()
    folder = options.runs or Path(tempfile.mkdtemp(prefix="companions-"))
    folder.mkdir(parents=True, exist_ok=True)
    scorers = folder / "scorers"
    if not (scorers / "ensemble.json").is_file():
        write_labels(folder / "labels.jsonl")
        report = train_linear_ensemble(
            folder / "labels.jsonl", scorers, number=NUM_MEMBERS, label_noise=LABEL_NOISE, seed=1
        )
        aucs = ", ".join(f"{member.auc:.3f}" for member in report.members)
        print(f"proxies: AUC {aucs}; of their mean {report.auc_of_mean:.3f}", flush=True)
    chosen = methods(scorers)
    names = options.only.split(",") if options.only else (QUICK if options.quick else tuple(chosen))
    found: dict[str, list[list[Point]]] = {}
    for name in names:
        for seed in range(1 if options.quick else options.seeds):
            run = folder / f"{name.replace(' ', '-')}-{seed}"
            settings = (*chosen[name], f"run.seed={seed}", f"run.num_rounds={options.rounds}")
            found.setdefault(name, []).append(train(run, settings))
            end = found[name][-1][-1]
            print(f"{run.name}: gold {end.gold:.3f} at drift {end.drift:.2f}", flush=True)
    print(table(found))
    plain = {name: [[asdict(p) for p in run] for run in runs] for name, runs in found.items()}
    (folder / "companions.json").write_text(json.dumps(plain, indent=1) + "\n")
    draw(found, folder / "companions.svg")
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
