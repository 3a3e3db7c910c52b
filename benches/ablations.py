"""The signs of the paper's ablations, on the embedded model: `python benches/ablations.py`.

Each row is a whole `quark train` run (a subprocess, so what is measured is what users run) that differs
from the preset in one setting. `--preset demo-paper` (the default) has the paper's loss, `--preset demo` the
contrast. The claims (Lu et al. 2022, section 4 and appendix; directions only):

- a larger beta keeps the model closer to the original: smaller KL;
- one quantile, or rewards that are noise, give no gain;
- training on the best quantile alone loses diversity;
- more quantiles reach at least the reward of two.

Prints a table and the verdict of each claim, writes `ablations.json` beside the runs, exits 1 if a sign
is wrong. Two cores need about 20 minutes for everything; `--rounds` shortens all runs alike.
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
)


def train(
    run: Run, folder: Path, *, preset: str, rounds: int | None, seed: int
) -> dict[str, float]:
    """Run it and return the figures of its closing object, judged by the sentiment scorer."""
    sets = [f"run.seed={seed}", *run.settings, 'evaluation.judges=["sentiment"]']
    if rounds is not None:
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help="folder for the runs (default: a temporary one)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        output = arguments.output or Path(temporary)
        output.mkdir(parents=True, exist_ok=True)
        rows: dict[str, dict[str, float]] = {}
        print(
            "| run | sentiment before | after | KL(policy ‖ reference), nats/token | distinct-2 | s |"
        )
        print("| --- | --- | --- | --- | --- | --- |")
        for index, run in enumerate(RUNS):
            rows[run.name] = row = train(
                run,
                output / f"run-{index}",
                preset=arguments.preset,
                rounds=arguments.rounds,
                seed=arguments.seed,
            )
            print(
                f"| {run.name} | {row['sentiment_before']:.3f} | {row['sentiment_after']:.3f} "
                f"| {row['kl_policy_to_reference']:.3f} | {row['distinct_2_after']:.3f} "
                f"| {row['seconds']:.0f} |",
                flush=True,
            )
        demo = rows[RUNS[0].name]

        def gain(name: str) -> float:
            return rows[name]["sentiment_after"] - rows[name]["sentiment_before"]

        demo_gain = gain(RUNS[0].name)
        claims = {
            "larger beta, smaller KL": rows["beta=0"]["kl_policy_to_reference"]
            > demo["kl_policy_to_reference"]
            > rows["beta=0.5"]["kl_policy_to_reference"],
            "K=1 gains less than a fifth of the preset's gain": gain("K=1") < demo_gain / 5,
            "random rewards gain less than a fifth": gain("random reward") < demo_gain / 5,
            **best_alone(arguments.preset, rows["best quantile only"], demo, demo_gain),
            "the preset's K or 8 reaches the reward of K=2": max(
                demo["sentiment_after"], rows["K=8"]["sentiment_after"]
            )
            >= rows["K=2"]["sentiment_after"] - 0.005,
        }
        print()
        for claim, holds in claims.items():
            print(f"{'holds' if holds else 'FAILS'}: {claim}")
        (output / "ablations.json").write_text(
            json.dumps({"rows": rows, "claims": claims}, indent=2) + "\n", encoding="utf-8"
        )
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
