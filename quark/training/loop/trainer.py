"""The loop of Quantized Reward Konditioning, top to bottom (Lu et al. 2022, algorithm 1).

    for each round:
        explore   sample completions given the best reward token (round 0: the original model, no token),
                  score them, commit them to the pool
        quantize  cut the whole pool into K quantiles of reward
        learn     M steps of the conditioned loss on minibatches of the pool
        evaluate  on held-out prompts, then checkpoint

What a run is at any moment: the newest checkpoint, plus the chunks that the pool has beyond it. Both are
durable, so a run that is killed goes on from there, and nothing that was generated is generated again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import numpy as np
from safetensors import SafetensorError

from quark.config.schema import RunConfig
from quark.errors import CheckpointError, TrainingError
from quark.evaluation.evaluator import Evaluation, Evaluator
from quark.evaluation.information import LabelledSamples
from quark.generation.base import Generator
from quark.models.policy import Policy
from quark.objectives.quark import QuarkObjective
from quark.pool.base import Quantization, Sample
from quark.pool.columns import REWARD_COLUMN
from quark.pool.native import NativePool
from quark.publication import publishing_directory
from quark.reference.base import ReferencePolicy
from quark.refusals import way_on
from quark.run_directory import RunDirectory
from quark.text_statistics import distinct_n
from quark.training.events import (
    BeforeAfter,
    Progress,
    RoundSummary,
    SampleView,
    TrainingListener,
    TrainingResult,
)
from quark.training.loop.advantages import Advantages
from quark.training.loop.alerts import Alert, Alerts, ControlGap
from quark.training.loop.brake import is_due, take_note
from quark.training.loop.draws import first_snapshot_with, quantize, round_sampler, settling_sampler
from quark.training.loop.exploration import Exploration, Explorer
from quark.training.loop.guards import require_finite
from quark.training.loop.information import InformationMeter
from quark.training.loop.learner import Learner
from quark.training.loop.metrics import MetricLog, SilentLog
from quark.training.loop.optimization import load_optimizer_tensors, optimizer_tensors
from quark.training.position import Answer, Baseline, Position
from quark.training.processes.distributed import Team
from quark.training.processes.memory import memory_needed_for
from quark.training.processes.sharding import WholeWeights
from quark.training.processes.shared import SharedEvaluator
from quark.training.state.checkpoint import Checkpoint, Checkpoints, model_tensors
from quark.training.state.model_card import card_section
from quark.training.state.run_state import Coefficients, PoolState, RunState
from quark.types import Completion


class Trainer:
    """Runs the loop. Built by ``assemble``, which knows every class; here only their contracts are used.

    Args:
        config: the effective configuration.
        run: where everything goes.
        run_id: of this run, in keys and logs.
        policy: is trained.
        reference: p0.
        explore_first: samples from p0 without a token.
        explore: samples from the policy.
        evaluate_first: samples from p0 for evaluation.
        evaluate: samples from the policy for evaluation.
        explorer: fills the pool.
        pool: opened for writing by the lead, for reading by the other processes.
        objective: the loss.
        evaluator: the held-out prompts.
        checkpoints: of this run.
        log: of this run.
        listener: is told what happens.
        autocast: the context for forward passes.
        team: the processes that run this loop together; all decide alike, the lead alone writes.
        weights: where the policy's lie among them.
        resume_from: the checkpoint to go on from.
        fingerprint: what has to be equal for a resumed run to be the same run; goes into checkpoints.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        run: RunDirectory,
        run_id: str,
        policy: Policy,
        reference: ReferencePolicy,
        explore_first: Generator,
        explore: Generator,
        evaluate_first: Generator,
        evaluate: Generator,
        explorer: Explorer,
        pool: NativePool,
        objective: QuarkObjective,
        evaluator: Evaluator | SharedEvaluator,
        checkpoints: Checkpoints,
        log: MetricLog | SilentLog,
        listener: TrainingListener,
        autocast: Callable[[], AbstractContextManager[object]],
        team: Team,
        weights: WholeWeights,
        resume_from: Checkpoint | None,
        fingerprint: Mapping[str, str],
    ) -> None:
        self.config = config
        self.run_directory = run
        self._run_id = run_id
        self._policy = policy
        self._explore_first = explore_first
        self._explore = explore
        self._evaluate_first = evaluate_first
        self._evaluate = evaluate
        self._explorer = explorer
        self._pool = pool
        self._objective = objective
        self._evaluator = evaluator
        self._checkpoints = checkpoints
        self._log = log
        self._listener = listener
        self._autocast = autocast
        self._team = team
        self._weights = weights
        self._fingerprint = dict(fingerprint)
        self._learner = Learner(
            config=config,
            policy=policy,
            reference=reference,
            objective=objective,
            autocast=autocast,
            team=team,
            weights=weights,
            on_warning=lambda text: listener.on_message(text, level="warning"),
            on_alert=self._alert,
        )
        self._meter = InformationMeter(
            config=config, policy=policy, team=team, weights=weights, autocast=autocast
        )
        self._alerts = Alerts(config.alerts)
        self._position = Position()
        self._learns_from: int | None = None
        self._started = time.monotonic()
        self._stop_requested = False
        self._is_stopping = False
        self._resume_from = resume_from

    def request_stop(self) -> None:
        """Finish the current step, chunk or evaluation, checkpoint, and return from ``run``.

        Callable from a signal handler. Without effect once the result is published.
        """
        self._stop_requested = True

    def run(self) -> TrainingResult:
        """Run to the end, or until ``request_stop``.

        Raises:
            RewardError: the reward failed and ``reward.on_error`` is ``fail``.
            TrainingError: too many steps in a row were not finite, memory does not suffice for one sequence,
                or an alert began and ``alerts.stop`` is set.
            CheckpointError: a checkpoint cannot be saved, or the one to go on from is another model's.
        """
        try:
            result = self._run()
            if result.interrupted:
                self._write_stop("interrupted", "asked to stop")
            return result
        except BaseException as error:
            kind = "failed" if isinstance(error, Exception) else "interrupted"
            self._write_stop(kind, f"{type(error).__name__}: {error}".rstrip(": "))
            raise
        finally:
            try:
                self._log.close()
            finally:
                self._pool.close()

    def _run(self) -> TrainingResult:
        if self._resume_from is not None:
            self._restore(self._resume_from)
        here = self._position
        # What a killed process left would take the room that the next checkpoint needs.
        if self._team.is_lead:
            self._checkpoints.prune()
        if here.baseline is None and not self._should_stop():
            here.baseline = self._measure_baseline()
        last: Evaluation | None = None
        while here.round < self.config.run.num_rounds and not self._should_stop():
            last = self._run_round()
        if self._should_stop():
            return self._interrupted()
        return self._finish(last)

    @property
    def _round(self) -> int:
        """Number of the round under way, from 0; of the last one while the result is made."""
        return min(self._position.round, self.config.run.num_rounds - 1)

    def _should_stop(self) -> bool:
        """Whether any process was asked to stop; all get the same answer, and keep to it."""
        self._is_stopping = self._is_stopping or self._team.any(self._stop_requested)
        return self._is_stopping

    def _run_round(self) -> Evaluation | None:
        """One round from wherever it is; returns its evaluation where one is due and it was finished."""
        here = self._position
        begin = time.monotonic()
        exploration = self._explore_round()
        if not exploration.is_complete:
            return None
        explored = time.monotonic()
        pool = self._snapshot_of(exploration)
        self._learns_from = pool.snapshot.generation
        new = range(max(exploration.ids.start, pool.num_removed), exploration.ids.stop)
        quantization = self._quantize(pool)
        alerts: list[Alert] = []
        if here.round == 0:
            alerts = self._alerts.check_first_rewards(
                pool.scores(REWARD_COLUMN)[new.start : new.stop]
            )
            for alert in alerts:
                self._alert(alert)
        if here.step_in_round == 0 and not here.fresh:
            here.fresh = self._meter.fresh(pool, quantization, new, bounds=here.previous_bounds)
        held_out = self._meter.held_out(pool, quantization)
        self._learn(quantization, pool, held_out)
        if not self._has_learned:
            return None
        metrics = self._round_metrics(pool, new, quantization) | here.means() | here.fresh
        metrics |= self._meter.measure_held_out(held_out)
        if self.config.run.brake_every_steps is not None:
            metrics["steps_braked"] = here.steps_braked
        metrics["seconds_exploring"] = explored - begin - exploration.seconds_scoring
        metrics["seconds_scoring"] = exploration.seconds_scoring
        metrics["seconds_by_chunk"] = [dataclasses.asdict(spans) for spans in exploration.spans]
        metrics["seconds_learning"] = time.monotonic() - explored
        evaluation = None
        is_last = here.round + 1 == self.config.run.num_rounds
        if is_last or (here.round + 1) % self.config.evaluation.every_rounds == 0:
            evaluation = self._evaluate_quantile(self.config.pool.num_quantiles - 1)
            metrics |= {f"evaluation_{k}": v for k, v in evaluation.metrics.items()}
            metrics |= {f"{name}_evaluation": v for name, v in evaluation.judges.items()}
        gap = self._control_gap(evaluation, is_last=is_last)
        if gap is not None:
            metrics["control_gap"] = gap.value
        self._report_round(pool, new, quantization, metrics)
        alerts += self._check_alerts(metrics, gap)
        here.begin_round(here.round + 1)
        if self._meter.measures_fresh:
            here.previous_bounds = quantization.lower_bounds.tolist()
        self._learns_from = None
        is_stopped = bool(alerts) and self.config.alerts.stop and not is_last
        if is_last or is_stopped or here.round % self.config.checkpoint.every_rounds == 0:
            self._save(score=evaluation.metrics["reward_mean"] if evaluation is not None else None)
        if is_stopped:
            raise TrainingError(
                f"alerts.stop is set and there is an alert ({alerts[0].text}). A checkpoint of step "
                f"{here.step} was written; the same command goes on from it until the next alert"
            )
        return evaluation

    # Explore

    def _explore_round(self) -> Exploration:
        """Bring the pool to where this round's learning begins; committed chunks are replayed."""
        here = self._position
        is_first = here.round == 0
        section = self.config.run
        begin = time.monotonic()
        tokens = 0.0

        def on_chunk(done: int, total: int, figures: Mapping[str, float]) -> None:
            nonlocal tokens
            tokens += figures.get("tokens", 0.0)
            shown = {k: v for k, v in figures.items() if k != "tokens"}
            elapsed = time.monotonic() - begin
            if tokens and elapsed > 0:
                shown["tokens_per_s"] = tokens / elapsed
            self._listener.on_progress(
                Progress(phase="exploring", round=here.round, done=done, total=total, metrics=shown)
            )

        with memory_needed_for("sampling", setting="sampling.batch_size"):
            exploration = self._explorer.explore(
                self._explore_first if is_first else self._explore,
                round=here.round,
                num_prompts=section.prompts_first_round if is_first else section.prompts_per_round,
                quantile=None if is_first else self.config.pool.num_quantiles - 1,
                policy_step=here.step - here.step_in_round,
                on_chunk=on_chunk,
                should_stop=self._should_stop,
            )
        if exploration.num_replayed and exploration.num_generated:
            self._listener.on_message(
                f"round {here.round}: {exploration.num_replayed} samples were in the pool already, "
                f"{exploration.num_generated} were generated"
            )
        detail = "; ".join(exploration.messages[:3])
        if exploration.num_retried:
            self._listener.on_message(
                f"round {here.round}: the reward raised and was called again "
                f"{'once' if exploration.num_retried == 1 else f'{exploration.num_retried} times'} ({detail})",
                level="warning",
            )
        if exploration.num_failed:
            self._listener.on_message(
                f"round {here.round}: {exploration.num_failed} of {exploration.num_generated} samples "
                f"got no score and are kept unranked ({detail})",
                level="warning",
            )
        for name, num_failed in exploration.num_failed_extra.items():
            self._listener.on_message(
                f"round {here.round}: {num_failed} of {exploration.num_generated} samples got no score "
                f"{name!r} ({detail})",
                level="warning",
            )
        return exploration

    # Quantize

    def _snapshot_of(self, exploration: Exploration) -> NativePool:
        """The pool as it was when this round's exploration was complete.

        It can be ahead of that where the run resumed from an older checkpoint, or was made to hold less.
        """
        pool = first_snapshot_with(self.run_directory.pool, exploration.ids.stop)
        if len(pool) != exploration.ids.stop:
            raise TrainingError(
                f"{self.run_directory.pool} has samples that this run did not put there, or lacks its older "
                f"snapshots: none holds {exploration.ids.stop} samples"
            )
        if _reward_version(pool) != _reward_version(self._pool):
            self._listener.on_message(
                f"round {self._position.round} learns by the scores that its samples had when it began; later rounds "
                "learn by those that were made since",
                level="warning",
            )
        return pool

    def _quantize(self, pool: NativePool) -> Quantization:
        quantization = quantize(pool, self.config.pool.ranking())
        if int(quantization.counts.sum()) == 0:
            num_samples = len(pool) - pool.num_removed
            section = self.config.pool
            asked = {key: getattr(section, key) for key in ("last_rounds", "where", "min_score")}
            asked = {key: value for key, value in asked.items() if value is not None}
            if asked and not np.isnan(pool.scores(REWARD_COLUMN)[pool.num_removed :]).all():
                said = " and ".join(f"pool.{key} = {value!r}" for key, value in asked.items())
                raise TrainingError(
                    f"none of the {num_samples} samples fulfils {said}: start a run that asks for less (--run-dir)"
                )
            raise TrainingError(
                f"none of the {num_samples} samples has a score: check the reward with `quark reward check`"
            )
        return quantization

    # Learn

    @property
    def _has_learned(self) -> bool:
        """Whether this round's steps are done, but for those that are left out."""
        here = self._position
        return here.step_in_round + here.steps_braked >= self.config.run.steps_per_round

    def _learn(
        self, quantization: Quantization, pool: NativePool, held_out: LabelledSamples | None
    ) -> None:
        """The rest of this round's optimizer steps."""
        here = self._position
        objective = self.config.objective
        advantages = None
        if objective.advantage_coef:
            advantages = Advantages.of(pool, objective.advantage_scope)
        self._settle(pool, quantization)
        sampler = round_sampler(pool, quantization, self.config, here.round)
        if here.step_in_round == 0:
            self._brake(held_out)
        while not self._has_learned and not self._should_stop():
            begin = time.monotonic()
            batch = sampler.batch(here.step_in_round, pad_id=self._policy.pad_id)
            step = self._learner.step(batch, here, advantages)
            metrics = step.metrics | {
                "tokens_per_s": step.num_tokens / max(time.monotonic() - begin, 1e-9)
            }
            self._log.write(
                "step",
                here.step,
                round=here.round,
                time_s=self._elapsed(),
                **metrics,
                micro_batch_size=step.micro_batch_size,
                is_skipped=not step.is_finite,
            )
            here.step += 1
            here.step_in_round += 1
            if step.is_finite:
                here.add(metrics)
            self._listener.on_progress(
                Progress(
                    phase="learning",
                    round=here.round,
                    done=here.step_in_round,
                    total=self.config.run.steps_per_round,
                    metrics=metrics,
                )
            )
            self._brake(held_out)
        self._weights.require_equal(step=here.step)

    def _brake(self, held_out: LabelledSamples | None) -> None:
        """Measure the held-out samples where that is due, and leave steps out where they say so."""
        here, section = self._position, self.config.run
        every, num_steps = section.brake_every_steps, section.steps_per_round
        if every is None or held_out is None or not is_due(here, every=every, num_steps=num_steps):
            return
        figures = self._meter.measure(held_out)
        if figures is None:
            return
        take_note(here, figures.contrast_loss, num_steps=num_steps)
        self._log.write(
            "held_out",
            here.step,
            round=here.round,
            **dataclasses.asdict(figures),
            steps_braked=here.steps_braked,
        )
        if here.steps_braked:
            self._listener.on_message(
                f"round {here.round}: what the tokens say of held-out samples got worse twice in a row, so the last "
                f"{here.steps_braked} of {num_steps} steps are left out"
            )

    def _settle(self, pool: NativePool, quantization: Quantization) -> None:
        """The settling steps, where they are to be made and were not."""
        here = self._position
        num_steps = self.config.optimizer.settling_steps
        if here.are_tokens_settled or here.step > 0 or num_steps == 0:
            return
        sampler = settling_sampler(pool, quantization, self.config)
        costs = self._learner.settle(
            [sampler.batch(i, pad_id=self._policy.pad_id) for i in range(num_steps)], here
        )
        here.are_tokens_settled = True
        self._log.write(
            "settling", here.step, round=here.round, time_s=self._elapsed(), kl_by_step=costs
        )

    # Evaluate

    def _measure_baseline(self) -> Baseline:
        """Figures of the original model without a token, with the answers that the end compares."""
        self._listener.on_progress(Progress(phase="evaluating", round=self._round, done=0, total=1))
        with _memory_for_evaluation(), self._autocast():
            evaluation = self._evaluator.evaluate(self._evaluate_first, self._policy, quantile=None)
        self._say_failures(evaluation)
        self._write_evaluation(evaluation)
        return Baseline(
            metrics=dict(evaluation.metrics),
            judges=dict(evaluation.judges),
            answers=tuple(
                Answer(
                    prompt=completion.prompt.text,
                    completion=completion.text,
                    reward=reward if math.isfinite(reward) else None,
                )
                for completion, reward in self._shown(evaluation)
            ),
        )

    def _evaluate_quantile(self, quantile: int, *, is_logged: bool = False) -> Evaluation:
        self._listener.on_progress(Progress(phase="evaluating", round=self._round, done=0, total=1))
        with _memory_for_evaluation(), self._autocast():
            evaluation = self._evaluator.evaluate(self._evaluate, self._policy, quantile=quantile)
        self._say_failures(evaluation)
        if not is_logged:
            self._write_evaluation(evaluation)
        return evaluation

    def _control_gap(self, best: Evaluation | None, *, is_last: bool) -> ControlGap | None:
        """The best token's reward over the lowest's, where it is to be measured after this round."""
        section = self.config.evaluation
        is_due = section.control_gap and not (is_last and section.control_curve)
        if best is None or not is_due or self.config.pool.num_quantiles == 1:
            return None
        return ControlGap.between(best.rewards, self._evaluate_quantile(0).rewards)

    def _say_failures(self, evaluation: Evaluation) -> None:
        for failure in evaluation.failures:
            self._listener.on_message(f"round {self._round}: {failure}", level="warning")

    def _write_evaluation(self, evaluation: Evaluation) -> None:
        self._log.write(
            "evaluation",
            self._position.step,
            round=self._round,
            quantile=evaluation.quantile,
            **evaluation.metrics,
            judges=evaluation.judges,
        )

    def _shown(self, evaluation: Evaluation) -> list[tuple[Completion, float]]:
        per_prompt = self.config.evaluation.completions_per_prompt
        indices = range(0, len(evaluation.completions), per_prompt)
        return [
            (evaluation.completions[i], float(evaluation.rewards[i]))
            for i in indices[: self.config.evaluation.show_prompts]
        ]

    # Report

    def _check_alerts(self, metrics: Mapping[str, object], gap: ControlGap | None) -> list[Alert]:
        """Tell what has begun to be wrong, and return it."""
        baseline = self._position.baseline
        assert baseline is not None
        alerts = self._alerts.check(metrics, baseline=baseline.metrics, gap=gap)
        for alert in alerts:
            self._alert(alert)
        return alerts

    def _alert(self, alert: Alert) -> None:
        here = self._position
        self._log.write("alert", here.step, round=self._round, **dataclasses.asdict(alert))
        self._listener.on_message(alert.text, level="warning")

    def _round_metrics(
        self, pool: NativePool, ids: range, quantization: Quantization
    ) -> dict[str, object]:
        """Figures of the samples that this round brought, read back from its snapshot of the pool."""
        everything = pool.scores(REWARD_COLUMN)
        rewards = everything[ids.start : ids.stop]
        scored = rewards[np.isfinite(rewards)].astype(np.float64)  # a sum may be beyond float32
        samples = pool.samples(ids)
        bounds = quantization.lower_bounds
        num_samples = len(pool) - pool.num_removed
        return {
            "samples": num_samples,
            "new_samples": len(ids),
            "failed_scores": int(np.isnan(rewards).sum()),
            "skipped_steps": self._position.skipped_in_round,
            "reward_mean": float(scored.mean()) if scored.size else math.nan,
            "reward_std": float(scored.std()) if scored.size else math.nan,
            "reward_min": float(scored.min()) if scored.size else math.nan,
            "reward_max": float(scored.max()) if scored.size else math.nan,
            "quantile_counts": quantization.counts,
            "quantile_lower_bounds": bounds,
            "tie_share": self.config.pool.ranking().tie_share(pool, quantization),
            "completion_length_mean": float(np.mean([len(s.completion_tokens) for s in samples])),
            "distinct_2": distinct_n([self._text(s) for s in samples], 2),
            "logprob_policy_mean": float(np.mean([s.logprob_policy for s in samples])),
            "logprob_reference_mean": float(np.mean([s.logprob_reference for s in samples])),
        }

    def _report_round(
        self,
        pool: NativePool,
        new: range,
        quantization: Quantization,
        metrics: Mapping[str, object],
    ) -> None:
        here = self._position
        self._log.write("round", here.step, round=here.round, time_s=self._elapsed(), **metrics)
        ids = np.arange(new.start, new.stop, dtype=np.uint64)
        labels = quantization.labels_of(ids)
        count = self.config.tracking.samples_per_round
        views = [
            [
                SampleView(
                    id=sample.id,
                    prompt=sample.prompt_text,
                    completion=self._text(sample),
                    reward=sample.scores[REWARD_COLUMN],
                    quantile=quantile,
                )
                for sample in pool.samples([int(i) for i in ids[labels == quantile][:count]])
            ]
            for quantile in (quantization.num_quantiles - 1, 0)
        ]
        self._listener.on_round(
            RoundSummary(
                round=here.round,
                num_rounds=self.config.run.num_rounds,
                metrics={k: float(v) for k, v in metrics.items() if isinstance(v, int | float)},
                best_samples=views[0],
                worst_samples=views[1],
            )
        )

    def _text(self, sample: Sample) -> str:
        if sample.completion_text is not None:
            return sample.completion_text
        text = self._policy.tokenizer.decode(
            sample.completion_tokens.tolist(), skip_special_tokens=True
        )
        return str(text)

    # Save and restore

    def _save(self, *, score: float | None = None) -> None:
        """Make a checkpoint; ``score`` is the held-out reward of just these weights."""
        here = self._position
        self._listener.on_progress(Progress(phase="saving", round=self._round, done=0, total=1))
        model = self._policy.model
        weights = self._weights.gather(model_tensors(model))
        optimizer = self._weights.gather(optimizer_tensors(self._learner.optimizer, model))
        if not self._team.is_lead:
            return
        snapshot = self._pool.snapshot
        # Parameters only: a buffer may hold infinities on purpose, a causal mask for one.
        parameters = {n: weights[n] for n, _ in model.named_parameters() if n in weights}
        require_finite({**parameters, **optimizer}, step=here.step)
        state = RunState(
            step=here.step,
            score=score,
            run_id=self._run_id,
            position=dataclasses.replace(here, seconds=self._elapsed()),
            objective=Coefficients(**self._objective.state_dict()),
            alerts=self._alerts.state(),
            pool=PoolState(
                generation=snapshot.generation,
                hash=snapshot.hash,
                samples=snapshot.num_samples,
                learns_from=self._learns_from,
            ),
            metrics_bytes=self._log.sync(),
            fingerprint=self._fingerprint,
        )
        self._checkpoints.save(state, weights=weights, optimizer=optimizer)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        checkpoint.load_model(self._policy.model)
        load_optimizer_tensors(
            self._learner.optimizer, self._policy.model, checkpoint.optimizer_tensors()
        )
        self._objective.load_state_dict(dataclasses.asdict(state.objective))
        if state.alerts is not None:
            self._alerts.restore(state.alerts)
        self._position = dataclasses.replace(state.position)
        self._learns_from = state.pool.learns_from

    def _elapsed(self) -> float:
        return self._position.seconds + time.monotonic() - self._started

    # End

    def _interrupted(self) -> TrainingResult:
        here = self._position
        if here.baseline is not None:
            self._save()
        where = f"in round {here.round}"
        if here.round == self.config.run.num_rounds:
            where = "before the result was published"
        self._listener.on_message(
            f"stopped {where} after {here.step} steps; the same command resumes"
        )
        return self._result(None, [], interrupted=True)

    def _finish(self, best: Evaluation | None) -> TrainingResult:
        """Control curve, the saved model, and the closing row; or an interruption before the model is published."""
        num_quantiles = self.config.pool.num_quantiles
        if best is None:
            # Killed between the last checkpoint and this: the log has this evaluation's row already.
            best = self._evaluate_quantile(num_quantiles - 1, is_logged=True)
        curve: list[float] = []
        if self.config.evaluation.control_curve:
            lower: list[Evaluation] = []
            for quantile in range(num_quantiles - 1):
                if self._should_stop():
                    return self._interrupted()
                lower.append(self._evaluate_quantile(quantile))
            curve = [evaluation.metrics["reward_mean"] for evaluation in (*lower, best)]
            self._log.write(
                "control_curve", self._position.step, round=self._round, reward_mean=curve
            )
            if lower:
                self._check_alerts({}, ControlGap.between(best.rewards, lower[0].rewards))
        self._listener.on_progress(Progress(phase="saving", round=self._round, done=0, total=1))
        if self._should_stop():
            return self._interrupted()
        result = self._result(best, curve, interrupted=False)
        with self._weights.whole():
            if self._team.is_lead:
                self._save_model(result)
        self._log.write("end", self._position.step, **dataclasses.asdict(result))
        self._log.sync()
        return result

    def _write_stop(self, kind: str, reason: str) -> None:
        """Close the log of a run that does not come to its end; a resume cuts this row off."""
        # A full disk refuses this row, too, and is told by the error that ends the run.
        with contextlib.suppress(Exception):
            self._log.write(
                "stop", self._position.step, round=self._round, kind=kind, reason=reason
            )
            self._log.sync()

    def _save_model(self, result: TrainingResult) -> None:
        """Write ``run/model`` beside itself and swap it in."""
        final = self.run_directory.model
        try:
            with publishing_directory(final, is_replacing=True) as staged:
                self._weights.alone.save(staged, max_new_tokens=self.config.sampling.max_new_tokens)
                with (staged / "README.md").open("a", encoding="utf-8") as card:
                    card.write(card_section(self.config, result))
        except (OSError, SafetensorError) as err:
            raise CheckpointError(
                f"cannot save the model {final}: {err}. The last checkpoint is good; {way_on(err)} to finish"
            ) from err

    def _result(
        self, best: Evaluation | None, curve: list[float], *, interrupted: bool
    ) -> TrainingResult:
        baseline = self._position.baseline
        before = baseline.metrics if baseline is not None else {}
        before_judges = baseline.judges if baseline is not None else {}
        after = best.metrics if best is not None else {}
        names = [
            n
            for n in before
            if n not in ("reward_mean", "kl_reference_to_policy", "kl_policy_to_reference")
        ]
        metrics = {f"{n}_before": float(before[n]) for n in names}
        metrics |= {f"{n}_after": float(after[n]) for n in names if n in after}
        metrics |= {f"{n}_before": v for n, v in before_judges.items()}
        metrics |= {f"{n}_after": v for n, v in (best.judges.items() if best else ())}
        metrics["skipped_steps"] = float(self._position.skipped_steps)
        answers = [
            BeforeAfter(
                prompt=answer.prompt,
                before=answer.completion,
                before_reward=math.nan if answer.reward is None else answer.reward,
                after=completion.text,
                after_reward=new_reward,
            )
            # `show_prompts` may have become another number since the baseline was measured.
            for answer, (completion, new_reward) in zip(
                baseline.answers if baseline is not None else (),
                self._shown(best) if best is not None else (),
                strict=False,
            )
        ]
        run = self.run_directory
        return TrainingResult(
            run_dir=run.path,
            pool=run.pool,
            model=run.model,
            report=None,
            rounds=self._position.round,
            samples=len(self._pool),
            reward_before=float(before.get("reward_mean", math.nan)),
            reward_after=float(after.get("reward_mean", math.nan)),
            kl_policy_to_reference=float(after.get("kl_policy_to_reference", math.nan)),
            kl_reference_to_policy=float(after.get("kl_reference_to_policy", math.nan)),
            control_curve=curve,
            seconds=self._elapsed(),
            interrupted=interrupted,
            metrics=metrics,
            before_after=answers,
        )


def _reward_version(pool: NativePool) -> int:
    """How often all rewards were made; 0 without any."""
    versions = {column.name: column.version for column in pool.info().score_columns}
    return versions.get(REWARD_COLUMN, 0)


def _memory_for_evaluation() -> AbstractContextManager[None]:
    return memory_needed_for("evaluating", setting="sampling.batch_size")
