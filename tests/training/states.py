"""The least that a checkpoint can say."""

from __future__ import annotations

from quark.training.position import Position
from quark.training.state.run_state import PoolState, RunState


def run_state(step: int, *, score: float | None = None) -> RunState:
    return RunState(
        step=step,
        score=score,
        run_id="a run",
        position=Position(step=step),
        objective={"kl_coef": 0.1, "entropy_coef": 0.0},
        alerts=None,
        pool=PoolState(generation=1, hash="0" * 64, samples=8),
        metrics_bytes=0,
        fingerprint={},
    )
