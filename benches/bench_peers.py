"""quark against TRL's GRPO and RLOO on the same model, reward and prompts: `python benches/bench_peers.py`.

The embedded model learns from the embedded sentiment scorer on the embedded prompts, completions of 16 tokens, each
library with its own sampling. TRL is no dependency of quark: give the folder it is installed in,

    pip install --target trl --no-deps trl datasets xxhash dill multiprocess
    python benches/bench_peers.py --trl trl

Each contender runs in a process of its own until the mean reward of its newest 512 training samples reaches
the target (quark's are sampled under the best token, as one would use it), or the samples are spent. TRL's
learning rate is the best of those given: the one that reaches the target with the least time.

On a CPU, time is processor time of one thread, sampling, reward, reference and training included and loading not; on
CUDA it is the clock. Memory is the process's peak (on CUDA the device's).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quark.text_statistics import distinct_n

WINDOW = 512
"""Newest samples whose mean reward is watched."""
TOKENS = 16


class Reached(Exception):  # noqa: N818 - no error: it ends a run
    """The target, or the end of the samples."""


class Watch:
    """Counts scored samples, watches their mean, and the clock."""

    def __init__(self, *, target: float, most: int, device: str) -> None:
        self.target, self.most, self.device = target, most, device
        self.samples = 0
        self.newest: list[float] = []
        self.texts: list[str] = []
        self.curve: list[tuple[int, float, float]] = []
        self.begin = self.clock()

    def clock(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, rewards: Sequence[float], *, at: float | None = None) -> None:
        self.samples += len(rewards)
        self.newest = [*self.newest, *rewards][-WINDOW:]
        mean = sum(self.newest) / len(self.newest)
        now = self.clock() if at is None else at
        self.curve.append((self.samples, mean, now - self.begin))

    def check(self) -> None:
        """End the run where it is decided."""
        is_full = len(self.newest) == WINDOW
        if (is_full and self.curve[-1][1] >= self.target) or self.samples >= self.most:
            raise Reached

    def result(self) -> dict[str, Any]:
        samples, mean, elapsed = self.curve[-1]
        if self.device == "cpu":
            status = Path("/proc/self/status").read_text()
            peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
        else:
            peak = torch.cuda.max_memory_allocated()
        return {
            "samples": samples,
            "reward": mean,
            "first_reward": self.curve[0][1],
            "seconds": elapsed,
            "is_reached": mean >= self.target,
            "peak_bytes": peak,
            "distinct_2": distinct_n(self.texts[-WINDOW:], 2),
        }


def run_quark(watch: Watch, device: str) -> None:
    """The demo preset, without evaluations."""
    from quark.config.load import load_config
    from quark.pool.native import NativePool
    from quark.run_directory import RunDirectory
    from quark.training.assemble import assemble
    from quark.training.events import Progress, RoundSummary, Silence

    class Listener(Silence):
        def __init__(self) -> None:
            self.explored = 0.0

        def on_progress(self, progress: Progress) -> None:
            if progress.phase == "exploring":
                if progress.round == 0 and progress.done == 0:
                    watch.begin = watch.clock()  # the original model has been evaluated
                self.explored = watch.clock()

        def on_round(self, summary: RoundSummary) -> None:
            # What a round's samples are worth was known when they were drawn, before it was learnt from.
            count = summary.metrics["samples"] - watch.samples
            watch.add([summary.metrics["reward_mean"]] * int(count), at=self.explored)
            watch.check()

    overrides = (
        "run.num_rounds=60",
        f"run.device={device}",
        "evaluation.every_rounds=1000",
        "evaluation.judges=[]",
        "pool.extra_scores=[]",
    )
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        try:
            assemble(load_config("demo", overrides), run_dir, listener=Listener()).run()
        finally:
            with NativePool.open(RunDirectory(run_dir).pool) as pool:
                newest = range(max(0, watch.samples - WINDOW), watch.samples)
                watch.texts = [sample.completion_text or "" for sample in pool.samples(newest)]


def run_trl(method: str, watch: Watch, device: str, learning_rate: float) -> None:
    """GRPO or RLOO with 8 completions a prompt, 128 a step, and a KL penalty like quark's."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from quark.assets import asset_path
    from quark.models.loading import ModelConfig, load_base_model, load_tokenizer
    from quark.rewards.build import build_reward
    from quark.rewards.config import RewardConfig

    scorer = build_reward(RewardConfig(name="sentiment"))
    rows = map(json.loads, asset_path("prompts", "reviews").read_text().splitlines())
    prompts = [{"prompt": row["prompt"]} for row in rows if row.get("split") != "eval"]

    def sentiment(prompts: list[str], completions: list[str], **_: Any) -> list[float]:  # noqa: ANN401
        scores = [float(s) for s in scorer(prompts=prompts, completions=completions)]
        watch.texts += completions
        watch.add(scores)
        watch.check()
        return scores

    kinds = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
    make_config, make_trainer = kinds[method]
    tokenizer = load_tokenizer(ModelConfig())
    tokenizer.pad_token = tokenizer.eos_token
    folder = tempfile.mkdtemp()
    model_dir = Path(folder) / "model"
    load_base_model(ModelConfig()).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    config = make_config(
        output_dir=folder,
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=TOKENS,
        temperature=1.0,
        top_k=0,
        beta=0.05,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_steps=100_000,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        seed=0,
    )
    trainer = make_trainer(
        model=str(model_dir),
        reward_funcs=sentiment,
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    watch.begin = watch.clock()
    trainer.train()


def child(task: dict[str, Any]) -> dict[str, Any]:
    if task["device"] == "cpu":
        torch.set_num_threads(1)
    watch = Watch(target=task["target"], most=task["samples"], device=task["device"])
    try:
        if task["name"] == "quark":
            run_quark(watch, task["device"])
        else:
            run_trl(task["name"], watch, task["device"], task["learning_rate"])
    except Reached:
        pass
    return watch.result()


def in_child(task: dict[str, Any], trl: Path | None) -> dict[str, Any]:
    """What a fresh process reports; an ``error`` where it could not."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, os.environ.get("PYTHONPATH", ""), *([str(trl)] if trl else [])]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(task)],
        # Behind the environment's own packages, which quark was tested with.
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["killed"])[-1][:300]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Run the contenders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", type=Path, help="folder that TRL was installed in")
    parser.add_argument("--target", type=float, default=0.9, help="mean reward to reach")
    parser.add_argument("--samples", type=int, default=16_384, help="most samples of a contender")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--methods", nargs="+", default=["quark", "grpo", "rloo"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return 0
    methods = list(arguments.methods)
    if arguments.trl is None and importlib.util.find_spec("trl") is None:
        print("TRL is not installed: skipped (see the top of this file for how to give it)")
        methods = [m for m in methods if m == "quark"]
    print(f"target: mean reward {arguments.target} over {WINDOW} samples")
    print("| | samples | reward, first → last | s | scored samples/s | peak MiB | distinct-2 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for method in methods:
        for rate in [None] if method == "quark" else arguments.learning_rates:
            task = {
                "name": method,
                "target": arguments.target,
                "samples": arguments.samples,
                "device": arguments.device,
                "learning_rate": rate,
            }
            found = in_child(task, arguments.trl)
            name = method if rate is None else f"{method}, learning rate {rate:g}"
            if "error" in found:
                print(f"| {name} | failed: {found['error']} | | | | | |", flush=True)
                continue
            mark = "" if found["is_reached"] else " (not reached)"
            print(
                f"| {name} | {found['samples']:,} | {found['first_reward']:.3f} → {found['reward']:.3f}{mark} "
                f"| {found['seconds']:.1f} | {found['samples'] / found['seconds']:.0f} "
                f"| {found['peak_bytes'] / 2**20:,.0f} | {found['distinct_2']:.2f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
