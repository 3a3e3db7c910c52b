"""A whole run in a second: a tiny random model, a few prompts, a reward that any bytes can move.

On one thread: runs are compared bit by bit, and the number of threads belongs to a process, so that it
would depend on what else a test run did before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch.distributed.fsdp import FSDPModule

from quark.config.load import LoadedConfig, load_config
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.assemble import assemble
from quark.training.events import Progress, RoundSummary, TrainingResult
from tests.tiny import save_tiny

NEEDS_SHARDING = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"),
    reason="sharding needs torch 2.13 or newer",
)
NUM_ROUNDS = 3
STEPS_PER_ROUND = 4
CONFIG = """
[run]
seed = 3
num_rounds = 3
steps_per_round = 4
prompts_first_round = 24
prompts_per_round = 12
chunk_size = 8
device = "cpu"
num_threads = 1

[model]
name = {model}

[prompts]
source = {prompts}
num_evaluation = 4

[sampling]
max_new_tokens = 6
batch_size = 8

[reward]
name = {reward}

[pool]
num_quantiles = 3
extra_scores = ["length"]

[objective]
kl_coef = 0.1
kl_target = 0.5
kl_horizon = 50

[optimizer]
batch_size = 9
micro_batch_size = 4
learning_rate = 1e-3
warmup_steps = 2
schedule = "linear"

[evaluation]
judges = ["diversity"]
completions_per_prompt = 2
show_prompts = 2
"""
REWARD = """
def low_bytes(prompts, completions):
    \"\"\"Share of characters before "a".\"\"\"
    return [sum(c < "a" for c in text) / (len(text) or 1) + 0.001 * len(text) for text in completions]
"""


@dataclass
class Listener:
    """Remembers what it is told, and does something at every event."""

    at_event: Callable[[int], None] = lambda number: None
    messages: list[str] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    rounds: list[RoundSummary] = field(default_factory=list)

    def on_message(self, text: str, *, level: Literal["info", "warning"] = "info") -> None:
        self.messages.append(f"{level}: {text}")

    def on_progress(self, progress: Progress) -> None:
        self.progress.append(progress)
        self.at_event(len(self.progress))

    def on_round(self, summary: RoundSummary) -> None:
        self.rounds.append(summary)


def write_inputs(folder: Path) -> Path:
    """Model, prompts, reward and configuration in ``folder``; returns the configuration's path."""
    model = save_tiny(folder / "model")
    prompts = folder / "prompts.jsonl"
    rows = [
        {"prompt": f"say {word}", "split": split}
        for split, words in (("train", "one two three four five six seven"), ("eval", "a b c d"))
        for word in words.split()
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = folder / "tiny_reward.py"
    reward.write_text(REWARD)
    config = folder / "tiny.toml"
    config.write_text(
        CONFIG.format(
            model=json.dumps(str(model)),
            prompts=json.dumps(str(prompts)),
            reward=json.dumps(f"{reward}:low_bytes"),
        )
    )
    return config


def train(
    config: Path | LoadedConfig,
    run_dir: Path,
    *,
    overrides: tuple[str, ...] = (),
    listener: Listener | None = None,
    stop_at: int | None = None,
    fresh: bool = False,
    force: bool = False,
    require_exact: bool = False,
    from_pool: Path | None = None,
) -> TrainingResult:
    """Run to the end, or ask to stop at the listener's ``stop_at``-th event."""
    loaded = config if isinstance(config, LoadedConfig) else load_config(config, overrides)
    listener = listener or Listener()
    trainer = assemble(
        loaded,
        run_dir,
        listener=listener,
        fresh=fresh,
        force=force,
        require_exact=require_exact,
        from_pool=from_pool,
    )
    if stop_at is not None:
        listener.at_event = lambda number: trainer.request_stop() if number >= stop_at else None
    return trainer.run()


TIMES = ("unix_time", "time_s", "seconds", "tokens_per_s", "run_dir", "pool", "model", "run_id")


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The metric log without what a clock, the folder's name or the run's id decides."""
    lines = RunDirectory(run_dir).metrics.read_text().splitlines()
    return [_without_times(json.loads(line)) for line in lines]


def _without_times(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: _without_times(item)
        for key, item in value.items()
        if not key.startswith("seconds_") and key.removesuffix("_mean") not in TIMES
    }


def fingerprint_of(run_dir: Path) -> dict[str, Any]:
    """What must be equal however often a run was interrupted; plain JSON.

    Of the pool, the bytes of every data file; its manifest holds an id of its own, and is read and verified.
    """
    run = RunDirectory(run_dir)
    assert NativePool.verify(run.pool).is_sound
    weights = load_file(run.model / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].tobytes())
    checkpoints = sorted(run.checkpoints.iterdir())
    state = json.loads((checkpoints[-1] / "state.json").read_bytes())
    with NativePool.open(run.pool) as pool:
        samples = [
            [
                s.prompt_text,
                s.completion_tokens.tolist(),
                s.round,
                s.chunk,
                s.policy_step,
                s.reward_token,
                s.seed,
                np.float32(s.logprob_policy).tobytes().hex(),
                np.float32(s.logprob_reference).tobytes().hex(),
                np.float32(s.logprob_sampled).tobytes().hex(),
                {name: np.float32(value).tobytes().hex() for name, value in s.scores.items()},
            ]
            for s in pool.samples(range(len(pool)))
        ]
    files = [p for p in run_dir.rglob("*") if p.suffix in (".arrow", ".safetensors")]
    return {
        "weights": digest.hexdigest(),
        "position": _without_times(state["position"]),
        "coefficients": state["objective"],
        "files": {
            str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(files)
        },
        "names": sorted(p.name for p in (*run_dir.glob("model*"), *checkpoints)),
        "samples": samples,
        "rows": rows_of(run_dir),
    }


def end_of(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves, but for older checkpoints, which are where it was stopped."""
    found = fingerprint_of(run_dir)
    newest = max(name for name in found.pop("names") if name.startswith("step-"))
    files = {
        name: digest
        for name, digest in found.pop("files").items()
        if not name.startswith("checkpoints/") or newest in name
    }
    state = json.loads((RunDirectory(run_dir).checkpoints / newest / "state.json").read_text())
    return found | {"files": files, "hooks": state.get("hooks", {})}
