"""Builds the parts of the loop from the loaded inputs of a run."""

from __future__ import annotations

from collections.abc import Callable

import quark
from quark.evaluation.evaluator import Evaluation
from quark.objectives.quark import QuarkObjective
from quark.pool.columns import member_column
from quark.pool.native import NativePool
from quark.reference.base import ReferencePolicy
from quark.reference.row_files import RowFiles
from quark.training.context import RunContext
from quark.training.factories import (
    held_out_sampling,
    make_evaluator,
)
from quark.training.generators import Generators
from quark.training.loop.averaging import WeightAverage
from quark.training.loop.cached_reference import CachedReference
from quark.training.loop.critic_hook import KeptCritic
from quark.training.loop.evaluating import Evaluating
from quark.training.loop.exploration import REFERENCE_BLOCK, Explorer
from quark.training.loop.exploring import Exploring
from quark.training.loop.frozen_standards import FrozenStandards
from quark.training.loop.hooks import WeightHook, WeightHooks
from quark.training.loop.information import InformationMeter
from quark.training.loop.journal import Journal
from quark.training.loop.learner import Learner
from quark.training.loop.learning import Learning
from quark.training.loop.metrics import MetricLog, SilentLog
from quark.training.loop.settling_hook import Settling
from quark.training.loop.trackers import make_trackers
from quark.training.processes.data_parallel import DataParallelEvaluator
from quark.training.state.checkpoint import Checkpoint


def make_exploring(
    context: RunContext,
    generators: Generators,
    pool: NativePool,
    reference: ReferencePolicy,
    journal: Journal,
) -> Exploring:
    """Exploration, which fills the pool."""
    config = context.config
    explorer = Explorer(
        run_id=context.run_id,
        seed=config.run.seed,
        prompts=context.prompts.train,
        pool=pool,
        reward=context.rewards.reward,
        extra_rewards=context.rewards.extra_columns,
        reward_config=config.reward,
        sampling=config.sampling,
        policy=context.policy,
        reference=reference,
        stores_text=config.pool.store_text,
        chunk_size=config.run.chunk_size,
        completions_per_prompt=config.run.completions_per_prompt,
        autocast=context.autocast,
        overlaps_scoring=config.overlaps_scoring,
        processes=context.processes,
    )
    return Exploring(
        pool=pool,
        explorer=explorer,
        original=generators.original(config.sampling),
        policy=generators.policy(config.sampling),
        run=config.run,
        ranking=config.pool,
        standards=FrozenStandards(
            columns=[member_column(i + 1) for i in range(len(config.reward.members))],
            combiner=config.combiner,
            path=context.directory.standards,
            processes=context.processes,
            journal=journal,
        ),
        journal=journal,
    )


def make_learning(
    context: RunContext,
    reference: ReferencePolicy,
    journal: Journal,
    *,
    measure: Callable[[], Evaluation],
) -> Learning:
    """Learning, which trains the policy. ``measure`` evaluates it on held-out prompts."""
    objective = QuarkObjective(context.config.objective)
    average = _make_average(context, journal, measure)
    if average is not None and context.config.average.kl_anchor == "ema":
        reference = average.reference()
    learner = Learner(
        config=context.config,
        policy=context.policy,
        reference=reference,
        objective=objective,
        autocast=context.autocast,
        processes=context.processes,
        weights=context.weights,
        on_warning=journal.warn,
        on_alert=journal.alert,
    )
    hooks: list[WeightHook] = []
    if context.config.optimizer.settling_steps:
        pad_id = context.policy.pad_id
        hooks.append(
            Settling(
                learner, context.config, pad_id=pad_id, position=journal.position, journal=journal
            )
        )
    if average is not None:
        hooks.append(average)
    if context.config.needs_critic:
        width = context.policy.reward_tokens.base_vocab_size
        hooks.append(KeptCritic(context.policy.critics, base_vocab_size=width))
    meter = InformationMeter(
        config=context.config,
        policy=context.policy,
        processes=context.processes,
        weights=context.weights,
        autocast=context.autocast,
    )
    return Learning(
        policy=context.policy,
        weights=context.weights,
        objective=objective,
        learner=learner,
        hooks=WeightHooks(*hooks),
        meter=meter,
        config=context.config,
        journal=journal,
    )


def _make_average(
    context: RunContext, journal: Journal, measure: Callable[[], Evaluation]
) -> WeightAverage | None:
    """The average of the weights, if the run keeps one."""
    if not context.config.average.is_used:
        return None
    return WeightAverage(
        context.policy,
        weights=context.weights,
        processes=context.processes,
        section=context.config.average,
        run=context.config.run,
        journal=journal,
        measure=measure,
    )


def make_evaluating(
    context: RunContext, generators: Generators, reference: ReferencePolicy, journal: Journal
) -> Evaluating:
    """Evaluation on held-out prompts."""
    config, rewards, processes = context.config, context.rewards, context.processes
    evaluator = make_evaluator(
        config, context.prompts.evaluation, reference, rewards.reward, rewards.judges
    )
    return Evaluating(
        evaluator=evaluator
        if processes.size == 1
        else DataParallelEvaluator(evaluator, processes, context.weights),
        original=generators.original(held_out_sampling(config)),
        policy=generators.policy(held_out_sampling(config)),
        model=context.policy,
        autocast=context.autocast,
        section=config.evaluation,
        num_quantiles=config.pool.num_quantiles,
        journal=journal,
    )


def kept_reference(context: RunContext, pool: NativePool) -> ReferencePolicy:
    """The reference policy, with a cache in files if the run asks for it."""
    if context.config.reference.cache == "off":
        return context.reference
    return CachedReference(
        context.reference,
        files=RowFiles(context.directory.reference_cache),
        pool=pool,
        run_id=context.run_id,
        policy=context.policy,
        block_size=REFERENCE_BLOCK,
        autocast=context.autocast,
        autocast_dtype=context.autocast_dtype,
        processes=context.processes,
    )


def open_log(context: RunContext, resume_from: Checkpoint | None) -> MetricLog | SilentLog:
    """The metric log, truncated to the point of resumption. A new log begins with a row about the run."""
    if not context.processes.is_main_process:
        return SilentLog()
    config, run_id = context.config, context.run_id
    log = MetricLog(
        context.directory.metrics,
        offset=resume_from.state.metrics_bytes if resume_from is not None else 0,
        trackers=make_trackers(
            config.tracking.trackers,
            context.directory.path,
            project=config.tracking.project,
            run_id=run_id,
            config=config.model_dump(mode="json"),
        ),
    )
    if resume_from is None:
        log.write(
            "run",
            0,
            run_id=run_id,
            quark_version=quark.__version__,
            device=str(context.device),
            versions=context.fingerprint,
        )
    return log
