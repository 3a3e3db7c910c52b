"""What a pool, a run or a table says about over-optimization: curves, and advice what to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quark.bounded_files import lines_of, parse_json
from quark.errors import DataError
from quark.evaluation.overoptimization import (
    Curve,
    CurvePoint,
    Floats,
    best_of_n_curve,
    training_curve,
)
from quark.pool.base import SamplePool
from quark.report.load import Row, RunData, figure, number_in

MIN_SAMPLES = 4
"""Of a prompt whose best of n is estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioned:
    """What the model does under one reward token."""

    quantile: int
    proxy: float
    gold: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Overopt:
    """Everything that was found; None or empty where there is no data for it."""

    best_of_n: Curve | None
    num_prompts: int
    """Behind the best-of-n curve."""
    num_left_out: int
    """Prompts with fewer than ``MIN_SAMPLES`` samples that have both scores."""
    training: Curve | None
    conditioning: tuple[Conditioned, ...]
    """By reward token, at the newest step at which several were measured."""
    best_guidance: float | None
    """Strength with the highest gold reward that `quark frontier` measured."""

    @property
    def advice(self) -> tuple[str, ...]:
        """What to keep, for people."""
        said = []
        if self.best_of_n is not None:
            said.append(_best_of_n_advice(self.best_of_n))
        if self.training is not None:
            said.append(_training_advice(self.training))
        golds = [each.gold for each in self.conditioning]
        if len(golds) > 1 and max(golds[:-1]) > golds[-1]:
            better = self.conditioning[golds.index(max(golds))].quantile
            said.append(
                f"the gold reward is higher from quantile {better} than from the best one: the best quantile asks "
                "for what fools the reward"
            )
        if self.best_guidance is not None:
            said.append(
                f"guidance {self.best_guidance:g} has the highest gold reward of those measured"
            )
        return tuple(said)


def _best_of_n_advice(curve: Curve) -> str:
    best, last = curve.best, curve.points[-1]
    if curve.is_past_its_peak and best.label != last.label:
        return f"best-of-n is past its peak: the gold reward is highest at n = {best.label} and lower at n = {last.label}"
    return f"best-of-n has no peak up to n = {last.label}"


def _training_advice(curve: Curve) -> str:
    best, last = curve.best, max(curve.points, key=lambda point: point.label)
    kept = f"keep the checkpoint of step {best.label}: its gold reward is the highest"
    if best.label == last.label:
        return f"{kept}, and it is the last one, so training on may still help"
    if curve.is_past_its_peak:
        return f"the run is past its peak: {kept}, and the reward of later ones is not real"
    return kept


def of_run(data: RunData, gold: str) -> tuple[Curve | None, tuple[Conditioned, ...], float | None]:
    """Training curve, conditioning curve and best guidance of a run, with the judge ``gold`` as the gold reward."""

    def golden(row: Row | None) -> float:
        judges = {} if row is None else row.get("judges")
        return number_in(judges.get(gold)) if isinstance(judges, dict) else math.nan

    points = []
    for row in data.best_evaluations:
        kl = figure(row, "kl_sampled_per_completion")
        values = (kl, figure(row, "reward_mean"), golden(row), figure(row, "step"))
        if all(map(math.isfinite, values)):
            points.append(
                CurvePoint(
                    label=int(values[3]),
                    kl=kl,
                    distance=math.sqrt(max(kl, 0.0)),
                    proxy=values[1],
                    gold=values[2],
                    effective=math.nan,
                )
            )
    base = golden(data.baseline)
    curve = training_curve(points, base) if points and math.isfinite(base) else None
    conditioning = _conditioning(data, golden)
    guidance = None
    if data.frontier is not None:
        best = max(
            (p.quantile for p in data.frontier.points if p.quantile is not None), default=None
        )
        measured = [
            (p.judges[gold].mean, p.guidance)
            for p in data.frontier.points
            if p.quantile is not None and p.quantile == best and gold in p.judges
        ]
        known = [pair for pair in measured if math.isfinite(pair[0])]
        guidance = max(known)[1] if known else None
    return curve, conditioning, guidance


def _conditioning(data: RunData, golden: Callable[[Row | None], float]) -> tuple[Conditioned, ...]:
    by_step: dict[float, dict[int, Conditioned]] = {}
    for row in data.evaluations:
        quantile = row.get("quantile")
        if isinstance(quantile, int):
            found = Conditioned(
                quantile=quantile, proxy=figure(row, "reward_mean"), gold=golden(row)
            )
            if math.isfinite(found.gold):
                by_step.setdefault(figure(row, "step"), {})[quantile] = found
    several = [step for step, found in by_step.items() if len(found) > 1]
    if not several:
        return ()
    newest = by_step[max(several)]
    return tuple(newest[quantile] for quantile in sorted(newest))


def prompts_of_pool(
    pool: SamplePool, *, proxy: str, gold: str
) -> tuple[list[tuple[Floats, Floats]], int]:
    """Scores of the original model's samples by prompt, and the number of prompts with too few of them.

    Raises:
        KeyError: the pool has no such score column.
    """
    is_original = (pool.column("reward_token") < 0) & (pool.column("round") == 0)
    return _grouped(
        pool.column("prompt_id")[is_original].tolist(),
        pool.scores(proxy)[is_original].astype(np.float64),
        pool.scores(gold)[is_original].astype(np.float64),
    )


def prompts_of_table(
    path: Path, *, proxy: str, gold: str
) -> tuple[list[tuple[Floats, Floats]], int]:
    """The same of a JSON lines file with the fields ``prompt``, ``proxy`` and ``gold``, all of the original model.

    Raises:
        DataError: a line is no such row.
    """
    prompts: list[str] = []
    scores: list[tuple[float, float]] = []
    for number, line in lines_of(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_json(line)
        except ValueError as err:
            raise DataError(f"{where}: {err}") from err
        if not isinstance(row, dict) or "prompt" not in row:
            raise DataError(f"{where}: a JSON object with a field 'prompt' is needed")
        prompts.append(str(row["prompt"]))
        scores.append((_score(row, proxy, where), _score(row, gold, where)))
    values = np.array(scores, dtype=np.float64).reshape(-1, 2)
    return _grouped(prompts, values[:, 0], values[:, 1])


def _score(row: dict[str, object], field: str, where: str) -> float:
    if field not in row:
        raise DataError(f"{where}: no field {field!r}; there is: {', '.join(map(repr, row))}")
    value = row[field]
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: {field!r} must be a number or null, not {repr(value)[:40]}")
    return float(value)


def _grouped(
    prompts: Sequence[int | str], proxy: Floats, gold: Floats
) -> tuple[list[tuple[Floats, Floats]], int]:
    places: dict[int | str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        samples = places.setdefault(prompt, [])
        if math.isfinite(proxy[place]) and math.isfinite(gold[place]):
            samples.append(place)
    enough = [samples for samples in places.values() if len(samples) >= MIN_SAMPLES]
    return [(proxy[samples], gold[samples]) for samples in enough], len(places) - len(enough)


def found_in(
    prompts: list[tuple[Floats, Floats]],
    num_left_out: int,
    run: tuple[Curve | None, tuple[Conditioned, ...], float | None],
) -> Overopt:
    """All of it; the best-of-n curve where there are prompts for it."""
    training, conditioning, guidance = run
    return Overopt(
        best_of_n=best_of_n_curve(prompts) if prompts else None,
        num_prompts=len(prompts),
        num_left_out=num_left_out,
        training=training,
        conditioning=conditioning,
        best_guidance=guidance,
    )
