"""A run directory as a finished run leaves it, with texts of the test's choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quark.pool.base import PromptRecord, SampleBatch
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory

NUM_QUANTILES = 5


def metrics_rows(text: str, *, num_rounds: int = 3) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "event": "run",
            "run_id": "abc",
            "quark_version": text,
            "versions": {"torch": text},
            "device": "cpu",
        },
        _evaluation(0, None, 0.5),
    ]
    rows.append({"event": "alert", "step": 0, "round": 0, "kind": "kl", "text": f"alert: {text}"})
    for round in range(num_rounds):
        rows += [
            {
                "event": "step",
                "round": round,
                "step": step,
                "loss": 3.5 - 0.01 * step,
                "lm_loss": 3.4 - 0.01 * step,
                "kl_reference_to_policy": 0.01 * step,
                "kl_policy_to_reference": None if step == 0 else 0.012 * step,
            }
            for step in range(round * 4, round * 4 + 4)
        ]
        rows.append(
            {
                "event": "round",
                "round": round,
                "step": round * 4 + 4,
                "samples": 10 * (round + 1),
                "reward_mean": 0.5 + 0.1 * round,
                "quantile_counts": [2] * NUM_QUANTILES,
            }
        )
        rows.append(_evaluation(round, NUM_QUANTILES - 1, 0.6 + 0.1 * round))
        curve = [0.1 * k + 0.01 * round for k in range(NUM_QUANTILES)]
        rows.append(
            {"event": "control_curve", "round": round, "step": round * 4 + 4, "reward_mean": curve}
        )
    return rows


def end_row(*texts: str) -> dict[str, Any]:
    return {
        "event": "end",
        "reward_before": 0.5,
        "reward_after": 0.9,
        "kl_policy_to_reference": 0.3,
        "samples": 30,
        "interrupted": False,
        "before_after": [
            {
                "prompt": text,
                "before": text,
                "before_reward": 0.1,
                "after": text,
                "after_reward": None,
            }
            for text in texts
        ],
    }


def _evaluation(round: int, quantile: int | None, reward: float) -> dict[str, Any]:
    return {
        "event": "evaluation",
        "round": round,
        "step": round * 4,
        "quantile": quantile,
        "reward_mean": reward,
        "perplexity_reference": 60.0,
        "distinct_1": 0.5,
        "distinct_2": 0.9,
        "distinct_3": 0.95,
    }


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fill_pool(path: Path, *texts: str, num_samples: int = 30) -> None:
    rng = np.random.default_rng(0)
    rewards = rng.random(num_samples).astype(np.float32)
    rewards[0] = np.nan
    storable = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    prompts = [
        PromptRecord(token_ids=np.array([index], np.uint32), text=text)
        for index, text in enumerate(storable)
    ]
    which = np.arange(num_samples, dtype=np.uint32) % len(texts)
    with NativePool.create(path, vocab_size=1000) as pool:
        pool.append(
            SampleBatch(
                key="run/0/0",
                prompts=prompts,
                prompt_index=which,
                completion_tokens=np.ones(num_samples, np.uint32),
                completion_offsets=np.arange(num_samples + 1, dtype=np.int64),
                completion_texts=[storable[index] for index in which],
                finish_reasons=np.ones(num_samples, np.uint8),
                round=0,
                chunk=0,
                policy_step=0,
                reward_tokens=np.full(num_samples, -1, np.int16),
                settings="{}",
                seeds=np.arange(num_samples, dtype=np.uint64),
                logprob_policy=np.full(num_samples, np.nan, np.float32),
                logprob_reference=np.full(num_samples, np.nan, np.float32),
                logprob_sampled=np.full(num_samples, np.nan, np.float32),
                scores={"reward": rewards},
            )
        )


def write_run(path: Path, *texts: str, with_pool: bool = True, ended: bool = True) -> Path:
    """A run whose every text is one of ``texts``."""
    texts = texts or ("harmless",)
    run = RunDirectory(path)
    path.mkdir(parents=True)
    origins = {"run.seed": texts[0]}
    identity = {"format_version": 1, "run_id": texts[0], "origins": origins}
    run.identity.write_text(json.dumps(identity), encoding="utf-8")
    settings = "".join(f"name_{i} = {json.dumps(_plain(text))}\n" for i, text in enumerate(texts))
    run.config.write_text(f"[run]\nseed = 1\n{settings}", encoding="utf-8")
    write_lines(run.metrics, [*metrics_rows(texts[0]), *([end_row(*texts)] if ended else [])])
    run.model.mkdir()
    if with_pool:
        fill_pool(run.pool, *texts)
    return path


def _plain(text: str) -> str:
    """What a TOML file can hold."""
    return "".join(c for c in text if c.isprintable() and c.isascii())
