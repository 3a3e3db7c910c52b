"""Reward against drift at equal numbers of scored samples: `python benches/frontier.py --trl FOLDER`.

quark's objectives, TRL's GRPO and RLOO, RAFT and best-of-n learn the same task: the embedded model, the embedded
sentiment scorer, the embedded prompts, completions of at most 16 tokens. Each run is a process of its own, on one
thread. At 256, 512, 1,024, 2,048 and 4,096 scored samples its model is measured on held-out prompts, quark's at several
strengths of guidance. The axes are the reward and KL(q || p0) in nats per completion, of the distribution q that is
sampled. All methods are measured by the same code.

TRL is no dependency of quark. Give the folder it is installed in:

    pip install --target trl --no-deps trl datasets xxhash dill multiprocess
    python benches/frontier.py --trl trl --json points.json --picture frontier.png

`--quick` takes one seed, up to 512 samples, three of quark's objectives, three strengths and no sweep. A critic's
strengths of guidance are four times those of tokens. `--tune` measures on 128 of the training
prompts instead, and trains on the others: settings are chosen there. `--contender "NAME: key=value ..."` adds a run of
quark with other settings.

The tables give the reward at a drift: the height there of the concave hull of a run's points, the original model
included. That height is a fact, since sampling from either of two models by a coin has the coin's mean of their rewards
and at most that of their drifts. A peer's runs differ in learning rate, completions a prompt and beta, and the best of
them in the mean over seeds counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from reward_drift.contenders import (
    BUDGETS,
    GUIDANCE,
    NEWEST_ROUND,
    QUARK,
    QUICK,
    QUICK_GUIDANCE,
    RAFT,
    Contender,
    peers,
)
from reward_drift.picture import draw
from reward_drift.runs import child
from reward_drift.tables import swept, tables
from reward_drift.task import Point, Task


def in_child(task: Task, trl: Path | None) -> list[Point]:
    """The points of a run in a fresh process.

    Raises:
        RuntimeError: it failed.
    """
    here = Path(__file__).resolve()
    paths = [str(here.parent.parent), os.environ.get("PYTHONPATH", ""), str(trl) if trl else ""]
    done = subprocess.run(
        [sys.executable, str(here), "--child", json.dumps(dataclasses.asdict(task))],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-8:]) or "killed")
    return [Point(**record) for record in json.loads(done.stdout.splitlines()[-1])]


def contenders(arguments: argparse.Namespace) -> list[Contender]:
    """Who takes part."""
    has_trl = arguments.trl is not None or importlib.util.find_spec("trl") is not None
    found = [
        *(c for c in QUARK if not arguments.quick or c.method in QUICK),
        *(() if arguments.quick else NEWEST_ROUND),
        RAFT,
    ]
    found.append(Contender(method="best-of-n", kind="best-of-n"))
    if has_trl:
        found += peers(is_swept=not arguments.quick)
    else:
        print("TRL is not installed: without GRPO and RLOO (--trl)", file=sys.stderr)
    for text in arguments.contender or ():
        name, _, settings = text.partition(":")
        found.append(Contender(method=name.strip(), settings=tuple(settings.split())))
    if arguments.only:
        found = [c for c in found if any(c.method.startswith(name) for name in arguments.only)]
    return found


def main() -> int:
    """Run all contenders, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", type=Path, help="folder that TRL was installed in")
    parser.add_argument("--quick", action="store_true", help="one seed, 512 samples, no sweep")
    parser.add_argument("--tune", action="store_true", help="measure on training prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--budgets", type=int, nargs="+", default=None)
    parser.add_argument(
        "--base", metavar="'KEY=VALUE ...'", help="quark settings of all: another task"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=None)
    parser.add_argument("--only", nargs="+", help="methods whose names contain one of these")
    parser.add_argument("--contender", action="append", metavar="NAME: KEY=VALUE ...")
    parser.add_argument("--json", type=Path, help="where the points go, as a list")
    parser.add_argument("--from-json", type=Path, nargs="+", help="points that are there already")
    parser.add_argument("--picture", type=Path, help="where the picture goes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        points = child(Task.parse(arguments.child))
        print(json.dumps([dataclasses.asdict(point) for point in points]))
        return 0
    seeds = arguments.seeds or ([0] if arguments.quick else [0, 1, 2, 3, 4])
    budgets = arguments.budgets or [b for b in BUDGETS if not arguments.quick or b <= 512]
    guidance = arguments.guidance or (QUICK_GUIDANCE if arguments.quick else GUIDANCE)
    points: list[Point] = []
    for file in arguments.from_json or ():
        points += [Point(**record) for record in json.loads(file.read_text())]
    failed = 0
    if not arguments.from_json:
        tasks = [
            Task(
                contender=contender,
                seed=seed,
                budgets=tuple(together),
                guidance=tuple(contender.guidance_scale * g for g in guidance),
                base=tuple((arguments.base or "").split()),
                is_tuning=arguments.tune,
            )
            for contender in contenders(arguments)
            for seed in seeds
            for together in ([[b] for b in budgets] if contender.is_annealed else [budgets])
        ]

        def run(task: Task) -> list[Point]:
            try:
                found = in_child(task, arguments.trl)
            except RuntimeError as error:
                print(f"{task.contender.method}, seed {task.seed}: {error}", file=sys.stderr)
                return []
            for point in found:
                print(
                    f"{point.method}{swept(point)}, seed {point.seed}: {point.samples:>5} samples, guidance {point.guidance:<4} reward {point.reward:.3f} at {point.kl_per_completion:5.2f} nats, "
                    f"distinct-2 {point.distinct_2:.2f}, length {point.length:.1f}, {point.cpu_seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            return found

        with ThreadPoolExecutor(arguments.jobs) as pool:
            for found in pool.map(run, tasks):
                failed += not found
                points += found
                if arguments.json:
                    records = [dataclasses.asdict(point) for point in points]
                    arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    originals = [p.reward for p in points if p.method == "best-of-n" and p.samples == 1]
    base = float(np.mean(originals)) if originals else 0.45
    print("\n".join(tables(points, base)))
    if arguments.picture:
        draw(points, base, arguments.picture)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
