from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quark.errors import CheckpointError
from quark.models.token_critic import CriticSlot, TokenCritic
from quark.training.loop.critic_hook import KeptCritic
from tests.training.tiny_run import Listener, rows_of, train, write_inputs

SCORES = np.linspace(-1.0, 1.0, 6, dtype=np.float32)


def test_a_critic_comes_back_from_its_state() -> None:
    slot = CriticSlot(TokenCritic(scores=SCORES, explained=0.3, num_samples=8))
    kept, found = KeptCritic(slot, base_vocab_size=6), CriticSlot()
    again = KeptCritic(found, base_vocab_size=6)
    again.load(kept.state())
    again.load_tensors(kept.tensors())
    assert found.critic is not None
    assert (found.critic.explained, found.critic.num_samples) == (0.3, 8)
    np.testing.assert_array_equal(found.critic.scores, SCORES)


@pytest.mark.parametrize("scores", [SCORES[:5], SCORES[None], np.where(SCORES > 0, np.nan, SCORES)])
def test_scores_of_another_vocabulary_are_refused(scores: np.ndarray) -> None:
    slot = CriticSlot()
    kept = KeptCritic(slot, base_vocab_size=6)
    kept.load({"explained": 0.3, "num_samples": 8})
    with pytest.raises(CheckpointError, match="6 finite ones are needed"):
        kept.load_tensors({"scores": torch.from_numpy(np.ascontiguousarray(scores))})
    assert slot.critic is None


@pytest.mark.parametrize("is_constant", [False, True])
def test_a_critic_that_explains_nothing_is_said(tmp_path: Path, is_constant: bool) -> None:
    config, listener = write_inputs(tmp_path), Listener()
    if is_constant:
        (tmp_path / "tiny_reward.py").write_text(
            "def low_bytes(*, prompts, completions):\n    return [1.0] * len(completions)\n"
        )
    settings = ("sampling.guide=critic", "sampling.guidance=2.0")
    train(config, tmp_path / "run", overrides=settings, listener=listener)
    said = [m for m in listener.messages if "the critic does not guide" in m]
    rows = [row for row in rows_of(tmp_path / "run") if row["event"] == "critic"]
    assert len(said) == sum(row["explained"] == 0.0 for row in rows)
    if is_constant:  # otherwise it depends on the random model
        assert len(said) == len(rows) > 0


def test_the_kl_alone_may_train_tokens_beside_a_critic(tmp_path: Path) -> None:
    settings = ("sampling.guide=critic", "objective.lm_coef=0")
    train(write_inputs(tmp_path), tmp_path / "run", overrides=settings)
    costs = [r["kl_reference_to_policy"] for r in rows_of(tmp_path / "run") if r["event"] == "step"]
    assert costs[-1] < costs[0]
