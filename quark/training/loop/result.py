"""The result of a run: figures before and after, and completions side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quark.evaluation.evaluator import Evaluation
from quark.run_directory import RunDirectory
from quark.training.events import BeforeAfter, TrainingResult
from quark.training.position import Position
from quark.types import Completion

_HEADLINES = ("reward_mean", "kl_reference_to_policy", "kl_policy_to_reference")
"""Figures that a result has under names of their own."""


def make_result(
    run: RunDirectory,
    position: Position,
    *,
    num_samples: int,
    seconds: float,
    best: Evaluation | None,
    shown: Sequence[tuple[Completion, float]],
    curve: Sequence[float],
    interrupted: bool,
) -> TrainingResult:
    """The result of a run.

    Args:
        run: its directory.
        position: where it is; has the figures of the original model.
        num_samples: in the pool.
        seconds: that it took.
        best: the last evaluation under the best token; None where there is none to compare with.
        shown: answers of ``best`` with their rewards, in the order of the original model's.
        curve: mean reward under each token.
        interrupted: whether it is not at its end.
    """
    baseline = position.baseline
    before = baseline.metrics if baseline is not None else {}
    before_judges = baseline.judges if baseline is not None else {}
    after = best.metrics if best is not None else {}
    names = [n for n in before if n not in _HEADLINES]
    metrics = {f"{n}_before": float(before[n]) for n in names}
    metrics |= {f"{n}_after": float(after[n]) for n in names if n in after}
    metrics |= {f"{n}_before": v for n, v in before_judges.items()}
    metrics |= {f"{n}_after": v for n, v in (best.judges.items() if best else ())}
    metrics["skipped_steps"] = float(position.skipped_steps)
    return TrainingResult(
        run_dir=run.path,
        pool=run.pool,
        model=run.model,
        report=None,
        rounds=position.round,
        samples=num_samples,
        reward_before=float(before.get("reward_mean", math.nan)),
        reward_after=float(after.get("reward_mean", math.nan)),
        kl_policy_to_reference=float(after.get("kl_policy_to_reference", math.nan)),
        kl_reference_to_policy=float(after.get("kl_reference_to_policy", math.nan)),
        control_curve=curve,
        seconds=seconds,
        interrupted=interrupted,
        metrics=metrics,
        before_after=[
            BeforeAfter(
                prompt=answer.prompt,
                before=answer.completion,
                before_reward=math.nan if answer.reward is None else answer.reward,
                after=completion.text,
                after_reward=new_reward,
            )
            # `show_prompts` may have become another number since the baseline was measured.
            for answer, (completion, new_reward) in zip(
                baseline.answers if baseline is not None else (), shown, strict=False
            )
        ],
    )
