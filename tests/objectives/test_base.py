"""The learner trains by any objective: here a likelihood weighted by the reward, written from the protocol alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quark.config.load import load_config
from quark.models.logprobs import LossWeights, weighted_loss
from quark.objectives.base import Objective
from quark.training import rooms
from quark.training.assemble import assemble
from quark.training.state.checkpoint import Checkpoints
from tests.training.tiny_run import Listener, rows_of, write_inputs


@dataclass
class Weighted:
    loss: Tensor
    sums: Mapping[str, float]


class RewardWeighted(Objective):
    """Likelihood weighted by the reward, which it reads from the pool and hands on as a batch field."""

    pool_columns = ("reward",)
    batch_fields = ("advantages",)

    def __init__(self, _config: object) -> None:
        self.num_steps = 0

    def begin_round(self, columns: Any) -> None:
        self.rewards = columns["reward"]

    def fields(self, ids: Any, quantiles: Any, *, reward_tokens: Sequence[int], seed: int) -> Any:
        return {"advantages": self.rewards[ids.astype(int)]}

    def micro_batches(self, batch: Any, number: int) -> Any:
        return batch.split(number)

    def __call__(
        self, policy: Any, reference: Any, batch: Any, *, num_sequences: int, num_tokens: int
    ) -> Weighted:
        row_of_token = batch.token_index // batch.completion_tokens.shape[1]
        by_token = batch.advantages[row_of_token] / num_sequences
        loss, _ = weighted_loss(
            policy.completion_rows(batch),
            None,
            batch.targets,
            LossWeights(
                lm=by_token, kl_reference_to_policy=0.0, kl_policy_to_reference=0.0, entropy=0.0
            ),
            base_vocab_size=policy.reward_tokens.base_vocab_size,
        )
        return Weighted(loss=loss, sums={"weight": float(batch.advantages.sum())})

    def figures(
        self, sums: Any, *, num_sequences: int, num_tokens: int, num_quantiles: int
    ) -> dict[str, float]:
        return {"weight": sums["weight"] / num_sequences}

    def after_step(self, sums: Any, *, num_sequences: int) -> None:
        self.num_steps += 1

    def state_dict(self) -> dict[str, float]:
        return {"taken": float(self.num_steps)}

    def load_state_dict(self, state: Any) -> None:
        self.num_steps = int(state["taken"])


def test_a_run_trains_by_an_objective_that_is_one_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rooms, "QuarkObjective", RewardWeighted)
    config, run_dir = write_inputs(tmp_path), tmp_path / "run"
    for num_rounds in (1, 2):
        loaded = load_config(config, (f"run.num_rounds={num_rounds}",))
        trainer = assemble(loaded, run_dir, listener=Listener())
        before = trainer._learning.policy.reward_vectors.clone()
        trainer.run()
        assert not torch.equal(before, trainer._learning.policy.reward_vectors)
    steps = [row for row in rows_of(run_dir) if row["event"] == "step"]
    assert [row["taken"] for row in steps] == list(range(len(steps)))
    assert all(row["weight"] >= 0.0 for row in steps)
    newest, _ = Checkpoints(run_dir / "checkpoints", keep_last=2).newest()
    assert newest is not None
    assert newest.state.objective == {"taken": len(steps)}
