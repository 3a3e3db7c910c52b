"""The signs of the paper's ablations, on the embedded model: `python benches/ablations.py`.

Each row is a whole `quark train` run (a subprocess, so what is measured is what users run) that differs
from the preset in one setting. `--preset demo-paper` (the default) has the paper's loss, `--preset demo` the
contrast. The claims (Lu et al. 2022, section 4 and appendix; directions only):

- a larger beta keeps the model closer to the original: smaller KL;
- one quantile, or rewards that are noise, give no gain;
- training on the best quantile alone loses diversity;
- more quantiles reach at least the reward of two.

The other rows have no claim of the paper: more frequent exploration, the tie rule, quantiles within each prompt, age, the
direction of the KL, the entropy bonus, and the contrast of docs/learning.md.

Every run is made with each of `--seeds` (three by default). Prints a table of means with the lowest and highest seed and the
verdict of each claim on the means, writes `ablations.json` beside the runs, draws reward against the root of the KL with
`--picture FILE`, and exits 1 if a sign is wrong. The full set takes two cores about an hour and a half. `--rounds` shortens
every run, and `--only` runs selected rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quark.config.load import load_config

HERE = Path(__file__).resolve().parent


def random_reward(*, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Noise in [0, 1) that knows nothing of the text but its identity."""
    return [
        zlib.crc32(f"{prompt}\0{completion}".encode()) / 2**32
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


@dataclass(frozen=True)
class Run:
    """One row: a name and what it sets."""

    name: str
    settings: tuple[str, ...] = ()


BETA = "objective.kl_coef"
LIKELIHOOD_ALONE = ("objective.lm_coef=1", "objective.contrast_coef=0")
RUNS = (
    Run("the preset"),
    Run("beta=0", (f"{BETA}=0.0",)),
    Run("beta=0.5", (f"{BETA}=0.5",)),
    # One token has nothing to be contrasted with.
    Run("K=1", ("pool.num_quantiles=1", *LIKELIHOOD_ALONE)),
    Run("K=2", ("pool.num_quantiles=2",)),
    Run("K=8", ("pool.num_quantiles=8", "objective.contrast_tokens=7")),
    Run("random reward", (f"reward.name={HERE / 'ablations.py'}:random_reward",)),
    Run("best quantile only", ("pool.train_quantiles=best",)),
    Run(
        "explore twice as often",
        ("run.num_rounds=24", "run.steps_per_round=8", "run.prompts_per_round=256"),
    ),
    Run("ties by age", ("pool.ties=older_first",)),
    Run(
        "quantiles within each prompt",
        (
            "pool.per_prompt=true",
            "run.completions_per_prompt=8",
            "run.prompts_first_round=256",
            "run.prompts_per_round=64",
        ),
    ),
    Run("newer samples more often", ("pool.age_half_life=2",)),
    Run("KL from policy to original", ("objective.kl_direction=kl_policy_to_reference",)),
    Run("entropy bonus", ("objective.entropy_coef=0.06",)),
    Run(
        "contrast",
        (
            "objective.lm_coef=0",
            "objective.contrast_coef=1",
            "objective.contrast_tokens=4",
            "objective.kl_coef=0.1",
        ),
    ),
)
CLAIMED = 8
"""The first rows, which the claims compare."""
FIGURES = ("sentiment_before", "sentiment_after", "kl_policy_to_reference", "distinct_2_after")


def train(
    run: Run, folder: Path, *, preset: str, rounds: int | None, seed: int
) -> dict[str, float]:
    """Run it and return the figures of its closing object, judged by the sentiment scorer."""
    sets = [f"run.seed={seed}", *run.settings, 'evaluation.judges=["sentiment"]']
    if rounds is not None and not any(s.startswith("run.num_rounds=") for s in sets):
        sets.append(f"run.num_rounds={rounds}")
    command = [sys.executable, "-m", "quark", "train", preset, "--json", "--run-dir", str(folder)]
    for setting in sets:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{run.name}: exit {done.returncode}\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout)
    metrics = result["metrics"]
    return {
        "sentiment_before": metrics["sentiment_before"],
        "sentiment_after": metrics["sentiment_after"],
        "kl_policy_to_reference": result["kl_policy_to_reference"],
        "distinct_2_after": metrics["distinct_2_after"],
        "seconds": result["seconds"],
    }


def best_alone(
    preset: str, row: dict[str, float], whole: dict[str, float], whole_gain: float
) -> dict[str, bool]:
    """What training on the best quantile alone does: the likelihood loses diversity, a contrast has nothing to tell apart."""
    if load_config(preset).config.objective.contrast_coef:
        gain = row["sentiment_after"] - row["sentiment_before"]
        return {"the best quantile alone gains less than a fifth": gain < whole_gain / 5}
    return {
        "the best quantile alone loses diversity": row["distinct_2_after"]
        < whole["distinct_2_after"]
    }


def main() -> int:
    """Run all rows, print the table and the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, help="learning rounds of every run (default: the preset's)"
    )
    parser.add_argument("--preset", default="demo-paper")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated seeds of every run")
    parser.add_argument("--only", action="append", help="name of a row; repeat it for several")
    parser.add_argument("--picture", type=Path, help="PNG file of reward against root KL")
    parser.add_argument(
        "--output", type=Path, help="folder for the runs (default: a temporary one)"
    )
    arguments = parser.parse_args()
    runs = [run for run in RUNS if not arguments.only or run.name in arguments.only]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        output = arguments.output or Path(temporary)
        output.mkdir(parents=True, exist_ok=True)
        rows: dict[str, list[dict[str, float]]] = {}
        print(
            "| run | sentiment before | after | KL(policy ‖ reference), nats/token | distinct-2 | s |"
        )
        print("| --- | --- | --- | --- | --- | --- |")
        for index, run in enumerate(runs):
            rows[run.name] = [
                train(
                    run,
                    output / f"run-{index}-{seed}",
                    preset=arguments.preset,
                    rounds=arguments.rounds,
                    seed=seed,
                )
                for seed in seeds
            ]
            cells = " | ".join(spread(rows[run.name], name) for name in FIGURES)
            seconds = mean(rows[run.name])["seconds"]
            print(f"| {run.name} | {cells} | {seconds:.0f} |", flush=True)
        means = {name: mean(found) for name, found in rows.items()}
        is_whole = all(run.name in means for run in RUNS[:CLAIMED])
        claims = verdicts(means, arguments.preset) if is_whole else {}
        print()
        for claim, holds in claims.items():
            print(f"{'holds' if holds else 'FAILS'}: {claim}")
        (output / "ablations.json").write_text(
            json.dumps({"seeds": seeds, "rows": rows, "claims": claims}, indent=2) + "\n",
            encoding="utf-8",
        )
        if arguments.picture is not None:
            draw(rows, arguments.picture)
    return 0 if all(claims.values()) else 1


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over seeds."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def spread(rows: Sequence[dict[str, float]], name: str) -> str:
    """The mean over seeds, with the lowest and highest."""
    values = [row[name] for row in rows]
    return f"{sum(values) / len(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def verdicts(means: dict[str, dict[str, float]], preset: str) -> dict[str, bool]:
    """Whether each claim of the paper holds for the means over seeds."""
    whole = means[RUNS[0].name]

    def gain(name: str) -> float:
        return means[name]["sentiment_after"] - means[name]["sentiment_before"]

    whole_gain = gain(RUNS[0].name)
    return {
        "larger beta, smaller KL": means["beta=0"]["kl_policy_to_reference"]
        > whole["kl_policy_to_reference"]
        > means["beta=0.5"]["kl_policy_to_reference"],
        "K=1 gains less than a fifth of the preset's gain": gain("K=1") < whole_gain / 5,
        "random rewards gain less than a fifth": gain("random reward") < whole_gain / 5,
        **best_alone(preset, means["best quantile only"], whole, whole_gain),
        "the preset's K or 8 reaches the reward of K=2": max(
            whole["sentiment_after"], means["K=8"]["sentiment_after"]
        )
        >= means["K=2"]["sentiment_after"] - 0.005,
    }


def draw(rows: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Reward against the root of the KL, a point for each seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name, found in rows.items():
        axes.scatter(
            [max(0.0, row["kl_policy_to_reference"]) ** 0.5 for row in found],
            [row["sentiment_after"] for row in found],
            label=name,
            s=18,
        )
    axes.set_xlabel("root of KL(policy ‖ original), nats per token")
    axes.set_ylabel("reward on held-out prompts")
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
