"""Measures a run's frontier: what `quark frontier` and `Run.frontier` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quark.api.measurement import Measurement, require_scores
from quark.evaluation.frontier import Point, best_within
from quark.evaluation.frontier_file import FrontierFile
from quark.run_directory import RunDirectory

_STRENGTHS: Mapping[str, Sequence[float]] = {
    "tokens": (0.0, 0.25, 0.5, 1.0, 2.0),
    "critic": (0.0, 1.0, 2.0, 3.0, 4.0, 6.0),
}
"""Strengths that are measured by default, by what guides."""


def measure_frontier(
    measurement: Measurement,
    run: RunDirectory,
    strengths: Sequence[float] | None,
    most_drift: float | None,
) -> tuple[FrontierFile, Point | None]:
    """Measure every token, and the best one at several strengths of guidance; the run keeps the result.

    Args:
        measurement: of the run.
        run: its directory.
        strengths: of guidance; None are those that suit what guides.
        most_drift: pick the strength of highest reward within this drift, in nats per completion.

    Returns:
        What was kept, and the point that was picked: None if none was to be, or every strength drifts farther.
    """
    config = measurement.config
    if strengths is None:
        strengths = _STRENGTHS[config.sampling.guide]
    tokens = measurement.policy.reward_tokens
    best = tokens.num_quantiles - 1
    # Without tokens, quantiles that nothing guides are the original model, all of them.
    own = 0.0 if tokens.are_placed else config.sampling.guidance
    wanted = [(None, 0.0), *((k, own) for k in range(best)), *((best, g) for g in strengths)]
    evaluations = [measurement.evaluate(g, quantile) for quantile, g in wanted]
    require_scores(evaluations, config.reward.name)
    per_prompt = config.evaluation.completions_per_prompt
    points = [
        Point.of(evaluation, guidance=g, per_prompt=per_prompt)
        for evaluation, (_, g) in zip(evaluations, wanted, strict=True)
    ]
    curve = [point for point in points if point.quantile == best]
    picked = None if most_drift is None else best_within(curve, most_drift=most_drift)
    kept = FrontierFile(
        reward=config.reward.name,
        num_prompts=len(measurement.prompts),
        points=tuple(points),
        picked=None if picked is None else picked.guidance,
    )
    kept.write(run)
    return kept, picked
