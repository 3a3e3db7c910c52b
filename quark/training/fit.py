"""Learns the conditioning from an existing pool, without generation or reward calls.

Samples of held-out prompts show whether the reward can be learned at all, and after how many steps a model begins to
memorize.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quark.config.schema import RunConfig
from quark.errors import ConfigError, DataError
from quark.evaluation.frontier import Interval
from quark.evaluation.information import (
    Information,
    LabelledSamples,
    completion_logprobs,
    drift_per_token,
    information_of_each,
    interval_over_groups,
)
from quark.models.check.kept import checked
from quark.models.policy import Policy
from quark.objectives.quark import QuarkObjective
from quark.pool.base import Quantization
from quark.pool.native import NativePool
from quark.printable import counted
from quark.publication import publishing_directory
from quark.training.factories import make_reference, untrained_policy, use_threads
from quark.training.loop.draws import held_out_samples, quantize, round_sampler, settling_sampler
from quark.training.loop.information import MOST_SAMPLES
from quark.training.loop.learner import Learner
from quark.training.position import Position
from quark.training.processes.devices import choose_device, make_autocast
from quark.training.processes.process_group import ProcessGroup
from quark.training.processes.weights import ReplicatedWeights
from quark.training.seeds import derive_seed

FEWEST_PROMPTS = 10
"""With fewer held-out prompts, an interval over them means little."""
_TRIED_TEXTS = 64
"""Number of samples whose text is compared with their decoded tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitPoint:
    """A measurement after some steps."""

    step: int
    """Number of optimizer steps before it."""
    train_information: float
    """log(1 + n) minus the contrast with n other tokens, averaged over the steps since the previous point; NaN without
    steps."""
    held_out: Information
    interval: Interval
    """Of the information of the held-out samples, over their prompts."""
    drift: float
    """KL(pi || p0) in nats a token under the best token, on the held-out samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The result: how well a model has learned a pool's reward."""

    num_quantiles: int
    num_train: int
    """Number of samples to learn from."""
    num_held_out: int
    """Number of samples of held-out prompts."""
    num_held_out_prompts: int
    learning_rate: float
    """Learning rate, configured or chosen by ``suited_rate``."""
    points: tuple[FitPoint, ...]
    """Measurements by step. The first one is before any step."""

    @property
    def chance(self) -> float:
        """The contrast of tokens without information: log K, in nats."""
        return math.log(self.num_quantiles)

    @property
    def best(self) -> FitPoint:
        """The point at which the tokens have the most information about the held-out samples."""
        return max(self.points, key=lambda p: np.nan_to_num(p.held_out.information, nan=-math.inf))

    @property
    def is_learned(self) -> bool:
        """Whether the information of the tokens is significant."""
        return self.best.interval.low > 0.0 and self.num_held_out_prompts >= FEWEST_PROMPTS

    @property
    def verdict(self) -> str:
        """Whether this reward can be learned from this pool, in one or two plain sentences."""
        best = self.best
        said = (
            f"{best.held_out.information:.3f} nats about held-out samples "
            f"(95 % interval {best.interval.low:.3f} to {best.interval.high:.3f}, at most {self.chance:.2f})"
        )
        if self.is_learned:
            then = f"Stop after {counted(best.step, 'step')}."
            if best is self.points[-1]:
                then = "The last measurement is the best one: try more --steps."
            return f"Yes, this reward can be learned from this pool: the tokens tell {said}. {then}"
        if self.num_held_out_prompts < FEWEST_PROMPTS:
            return (
                f"Not known: {counted(self.num_held_out_prompts, 'held-out prompt')} cannot rule out chance, it takes "
                f"{FEWEST_PROMPTS}. The tokens tell at best {said}."
            )
        ordered = max(
            self.points, key=lambda p: np.nan_to_num(p.held_out.rank_correlation, nan=-1.0)
        )
        correlation = ordered.held_out.rank_correlation
        low = least_correlation(correlation, self.num_held_out_prompts)
        if low > 0.0:
            return (
                "In part: after "
                f"{counted(ordered.step, 'step')} the tokens order held-out samples (rank correlation {correlation:.2f}, 95 % "
                f"interval from {low:.2f}), but are too sure of it to tell clearly more than chance. Try a smaller "
                "optimizer.learning_rate, a larger objective.contrast_temperature or more samples."
            )
        if best.held_out.information > 0.0:
            return (
                f"Not shown: the tokens tell at best {said}, which may be chance. More samples would show it, or fewer "
                "quantiles (--set pool.num_quantiles=2)."
            )
        return (
            "No, this reward was not learned from this pool: the tokens never tell more than chance about held-out "
            "samples. Try more samples, fewer quantiles (--set pool.num_quantiles=2) or another "
            "optimizer.learning_rate."
        )


def fit(
    pool: NativePool,
    config: RunConfig,
    *,
    score: str,
    every: int,
    out: Path | None,
    is_rate_chosen: bool = False,
    on_begin: Callable[[Fit], None],
    on_point: Callable[[FitPoint], None],
    on_message: Callable[[str], None],
) -> Fit:
    """Train the configured model on a pool, and measure it on the prompts that ``pool.held_out_share`` keeps back.

    Args:
        pool: the pool, which is only read.
        config: the configuration, for one round of ``run.steps_per_round`` steps.
        score: the column to rank by.
        every: number of steps between two measurements. There is also one before the first step and after the last.
        out: folder for the model at the point with the most information about the held-out samples; None saves none.
        is_rate_chosen: whether ``suited_rate`` replaces the configured learning rate.
        on_begin: called with the result before any points.
        on_point: called with each measurement.
        on_message: called with warnings.

    Raises:
        ConfigError: the settings do not fit the pool, or ``out`` is taken.
        DataError: the pool's tokens belong to another model, or it has too few samples to learn from or to measure.
        ModelError: the model cannot be used.
        TrainingError: too many steps in a row were not finite, or memory does not suffice.
    """
    if out is not None:
        _check_place(out)
    quantization, num_train, held_out = _parts(pool, config, score)
    device = choose_device(config.run.device)
    use_threads(config)
    policy = _policy(config, device, pool, on_message)
    if is_rate_chosen:
        optimizer = config.optimizer.model_copy(update={"learning_rate": suited_rate(policy)})
        config = config.model_copy(update={"optimizer": optimizer})
    reference = make_reference(config, policy, device)
    autocast = make_autocast(config.run.precision, device)
    processes = ProcessGroup()
    learner = Learner(
        config=config,
        policy=policy,
        reference=reference,
        objective=QuarkObjective(config.objective),
        autocast=autocast,
        processes=processes,
        weights=ReplicatedWeights(policy, processes),
        on_warning=on_message,
        on_alert=lambda alert: on_message(alert.text),
    )
    learner.begin_round(pool, quantization, score=score)
    prompts = pool.column("prompt_id")[held_out.ids.astype(np.int64)]
    result = Fit(
        num_quantiles=config.pool.num_quantiles,
        num_train=num_train,
        num_held_out=len(held_out),
        num_held_out_prompts=len(np.unique(prompts)),
        learning_rate=config.optimizer.learning_rate,
        points=(),
    )
    on_begin(result)
    size, temperature = config.sampling.batch_size, config.objective.contrast_temperature

    def measured(step: int, since: list[float]) -> FitPoint:
        with autocast():
            logprobs = completion_logprobs(policy, held_out, batch_size=size)
            drift = drift_per_token(policy, reference, held_out, batch_size=size)
        gains = information_of_each(logprobs, held_out.labels, temperature=temperature)
        return FitPoint(
            step=step,
            train_information=float(np.mean(since)) if since else math.nan,
            held_out=Information.of(
                logprobs, held_out.labels, held_out.rewards, temperature=temperature
            ),
            interval=interval_over_groups(gains, prompts),
            drift=drift,
        )

    position = Position()
    if config.optimizer.settling_steps:
        settling = settling_sampler(pool, quantization, config)
        steps = range(config.optimizer.settling_steps)
        learner.settle([settling.batch(step, pad_id=policy.pad_id) for step in steps], position)
    sampler = round_sampler(pool, quantization, config, 0)
    since: list[float] = []
    kept: dict[str, Tensor] = {}
    num_steps = config.run.steps_per_round
    for step in range(num_steps + 1):
        if step % every == 0 or step == num_steps:
            point = measured(step, since)
            since.clear()
            on_point(point)
            result = replace(result, points=(*result.points, point))
            if out is not None and result.best is point:
                kept = _trained(policy)
        if step < num_steps:
            batch = sampler.batch(step, pad_id=policy.pad_id)
            taken = learner.step(batch, position)
            if taken.is_finite and "information" in taken.metrics:
                since.append(taken.metrics["information"])
            position.step += 1
            position.step_in_round += 1
    if out is not None:
        _save(policy, kept, out, max_new_tokens=config.sampling.max_new_tokens)
    return result


def suited_rate(policy: Policy) -> float:
    """A learning rate for a model of this size: about that of the paper for its model, and higher for smaller ones.

    It is 1e-5 * sqrt(10^9 / parameters), ten times as much if only a part of the weights is trained, and between 1e-5
    and 1e-3.
    """
    parameters = list(policy.model.parameters())
    rate = 1e-5 * math.sqrt(1e9 / sum(parameter.numel() for parameter in parameters))
    if not all(parameter.requires_grad for parameter in parameters):
        rate *= 10
    return float(f"{min(max(rate, 1e-5), 1e-3):.1e}")


def _check_place(out: Path) -> None:
    """Refuse a path where the model could not be saved, before learning begins."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} is there already: give --out a new name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"--out {out}: {err.strerror}: {err.filename}") from err


def least_correlation(correlation: float, num_groups: int) -> float:
    """The lower end of the 95 % interval of a rank correlation, by Fisher's transformation, for independent groups.

    NaN without a correlation, or with fewer than four groups.
    """
    if math.isnan(correlation) or num_groups < 4:
        return math.nan
    return math.tanh(math.atanh(min(correlation, 0.999999)) - 1.96 / math.sqrt(num_groups - 3))


def check_tokens(
    pool: NativePool, policy: Policy, model: str, *, way_out: str = "give --model"
) -> None:
    """Refuse a model whose tokens differ from the pool's, as far as the pool can tell.

    The pool knows the size of its vocabulary, and the text of its completions if it stores text.

    Args:
        pool: whose tokens they are.
        policy: the model.
        model: its name.
        way_out: how the caller names another model, as the beginning of a sentence.

    Raises:
        DataError: the model has other tokens.
    """
    named = pool.info().metadata.get("model")
    whose = f"{named}'s" if isinstance(named, str) else "another model's"
    wanted, found = pool.settings.vocab_size, policy.reward_tokens.base_vocab_size
    if wanted != found:
        raise DataError(
            f"the pool holds {whose} tokens, of a vocabulary of {wanted}, and {model} has one of {found}: {way_out} "
            "the model that wrote them"
        )
    ids = range(pool.num_removed, min(len(pool), pool.num_removed + _TRIED_TEXTS))
    tried = [sample for sample in pool.samples(ids) if sample.completion_text]
    others = [
        sample
        for sample in tried
        if policy.tokenizer.decode(
            sample.completion_tokens.tolist(), skip_special_tokens=True
        ).split()
        != (sample.completion_text or "").split()
    ]
    if len(others) * 2 > len(tried):
        raise DataError(
            f"the pool holds {whose} tokens: {model} reads {len(others)} of {len(tried)} completions as another text than "
            f"the one that is stored beside them. {way_out[0].upper()}{way_out[1:]} the model that wrote them"
        )


def _policy(
    config: RunConfig, device: torch.device, pool: NativePool, on_message: Callable[[str], None]
) -> Policy:
    """The model to train. Raises DataError, ModelError if it does not fit the pool or fails a check."""
    policy = untrained_policy(config, device)
    check_tokens(pool, policy, config.model.name)
    check = checked(config.model, policy)
    check.require(config.model.name)
    for note in check.notes:
        on_message(f"{config.model.name}: {note}")
    return policy


def _parts(
    pool: NativePool, config: RunConfig, score: str
) -> tuple[Quantization, int, LabelledSamples]:
    """The ranking, the number of samples to learn from, and the samples to measure on."""
    try:
        quantization = quantize(pool, config.pool.ranking(score))
    except KeyError:
        there = ", ".join(pool.score_columns) or "none"
        raise ConfigError(f"--score {score}: the pool has no such column; it has {there}") from None
    is_held_out = held_out_samples(pool, config)
    assert is_held_out is not None, "the command asks for a part above 0"
    labels = quantization.labels()
    usable = labels >= 0
    train = int((usable & ~is_held_out).sum())
    ids = np.flatnonzero(usable & is_held_out).astype(np.uint64)
    if not train or len(ids) < 2:
        num_prompts = len(np.unique(pool.column("prompt_id")[usable]))
        raise DataError(
            f"the pool has {counted(int(usable.sum()), 'ranked sample')} of {counted(num_prompts, 'prompt')}, which leaves {train} to learn from "
            f"and {len(ids)} held out: it takes more prompts, or another --held-out"
        )
    if len(ids) > MOST_SAMPLES:
        # From all rounds equally, because samples of a trained policy are mostly good.
        chance = np.random.default_rng(derive_seed(config.run.seed, "fit"))
        ids = np.sort(chance.choice(ids, MOST_SAMPLES, replace=False))
    places: NDArray[np.int64] = ids.astype(np.int64)
    held_out = LabelledSamples(
        pool=pool, ids=ids, labels=labels[places], rewards=pool.scores(score)[places]
    )
    return quantization, train, held_out


def _trained(policy: Policy) -> dict[str, Tensor]:
    """A copy of the tensors that training changes."""
    return {
        name: parameter.detach().clone()
        for name, parameter in policy.model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def _save(policy: Policy, kept: dict[str, Tensor], out: Path, *, max_new_tokens: int) -> None:
    """Write ``policy`` with the weights ``kept``. The folder appears complete or not at all."""
    for name, parameter in policy.model.named_parameters():
        if name in kept:
            parameter.copy_(kept[name])
    out.parent.mkdir(parents=True, exist_ok=True)
    with publishing_directory(out) as staged:
        policy.save(staged, max_new_tokens=max_new_tokens)
