from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from quark.errors import ModelError
from quark.generation.base import SamplingConfig
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.loading import load_saved_policy
from quark.models.token_critic import CRITIC_FILE, TokenCritic, strengths_of
from quark.types import Prompt
from tests.tiny import tiny_policy

SCORES = np.linspace(-1.0, 2.0, 7, dtype=np.float32)
CRITIC = TokenCritic(scores=SCORES, explained=0.25, num_samples=40)


def test_a_saved_policy_keeps_its_critic(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.save(tmp_path / "without")
    assert load_saved_policy(tmp_path / "without").critics.critic is None
    scores = np.random.default_rng(0).normal(size=policy.reward_tokens.base_vocab_size)
    critic = TokenCritic(scores=scores.astype(np.float32), explained=1 / 3, num_samples=12)
    policy.critics.critic = critic
    policy.save(tmp_path / "with")
    found = load_saved_policy(tmp_path / "with").critics.critic
    assert found is not None
    assert (found.explained, found.num_samples) == (1 / 3, 12)
    np.testing.assert_array_equal(found.scores, critic.scores)


@pytest.mark.parametrize(
    ("scores", "changed", "said"),
    [
        (SCORES[:-1], {}, "for a vocabulary of 7"),
        (SCORES.reshape(1, 7), {}, "for a vocabulary of 7"),
        (SCORES.astype(np.float64), {}, "no finite float32"),
        (np.where(SCORES > 1, np.nan, SCORES).astype(np.float32), {}, "no finite float32"),
        (SCORES, {"format_version": 2}, "format version 2, this quark reads 1"),
        (SCORES, {"explained": "much"}, "cannot be read"),
        (SCORES, {"num_samples": "9" * 5000}, "cannot be read"),
    ],
)
def test_a_damaged_critic_is_named(
    tmp_path: Path, scores: np.ndarray, changed: dict[str, Any], said: str
) -> None:
    good = {"format_version": 1, "explained": 0.5, "num_samples": 3}
    save_file(
        {"scores": np.ascontiguousarray(scores)},
        tmp_path / CRITIC_FILE,
        metadata={"quark_critic": json.dumps(good | changed)},
    )
    with pytest.raises(ModelError, match=said) as raised:
        TokenCritic.read(tmp_path, base_vocab_size=7)
    assert CRITIC_FILE in str(raised.value)


def test_a_file_that_is_cut_is_named(tmp_path: Path) -> None:
    CRITIC.save(tmp_path)
    content = (tmp_path / CRITIC_FILE).read_bytes()
    for length in (0, 5, 40, len(content) - 1):
        (tmp_path / CRITIC_FILE).write_bytes(content[:length])
        with pytest.raises(ModelError, match=CRITIC_FILE):
            TokenCritic.read(tmp_path, base_vocab_size=7)


def test_the_best_quantile_gets_the_strength_and_the_worst_its_negative() -> None:
    np.testing.assert_allclose(CRITIC.tilt(2.0, quantile=4, num_quantiles=5), 2.0 * SCORES)
    np.testing.assert_allclose(CRITIC.tilt(2.0, quantile=0, num_quantiles=5), -2.0 * SCORES)
    np.testing.assert_allclose(CRITIC.tilt(2.0, quantile=2, num_quantiles=5), 0.0 * SCORES)
    assert (np.diff(strengths_of(3.0, 6)) > 0).all()


def test_plain_transformers_is_guided_by_a_logits_processor(tmp_path: Path) -> None:
    """As docs/learning.md says: greedy completions are the same."""
    policy = tiny_policy()
    width = policy.reward_tokens.base_vocab_size
    scores = np.random.default_rng(1).normal(size=width).astype(np.float32)
    policy.critics.critic = TokenCritic(scores=scores, explained=0.5, num_samples=12)
    policy.save(tmp_path)
    prompt = Prompt(index=0, text="one", token_ids=tuple(policy.tokenizer.encode("one")))
    settings = {"guide": "critic", "guidance": 2.0, "temperature": 0.0, "max_new_tokens": 6}
    sampling = SamplingConfig.model_validate(settings)
    ours = TransformersGenerator(
        policy, policy.tokenizer, policy.reward_tokens, sampling, torch.device("cpu")
    )
    (expected,) = ours.generate([prompt], quantile=4, seed=0)

    kept = torch.from_numpy(load_file(tmp_path / CRITIC_FILE)["scores"])

    def along_the_critic(input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits[:, : len(kept)] += 2.0 * kept
        return logits

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    asked = torch.tensor([[policy.reward_tokens.best, *prompt.token_ids]])
    found = model.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=6,
        logits_processor=[along_the_critic],
    )[0, asked.shape[1] :]
    assert found.tolist()[: len(expected.token_ids)] == expected.token_ids.tolist()
