"""The loop of Quantized Reward Konditioning, top to bottom (Lu et al. 2022, algorithm 1).

    for each round:
        explore   sample completions given the best reward token (round 0: the original model, no token),
                  score them, commit them to the pool
        quantize  cut the whole pool into K quantiles of reward
        learn     M steps of the conditioned loss on minibatches of the pool
        evaluate  on held-out prompts, then checkpoint

The state of a run is the newest checkpoint plus the chunks committed after it. Both are durable, so a killed run
continues from there and generates nothing twice.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import numpy as np

from quark.errors import CheckpointError, TrainingError
from quark.evaluation.evaluator import Evaluation
from quark.pool.columns import REWARD_COLUMN
from quark.training.events import TrainingResult
from quark.training.loop.alerts import Alert, Alerts, ControlGap
from quark.training.loop.evaluating import Evaluating
from quark.training.loop.exploring import Exploring
from quark.training.loop.guards import require_finite
from quark.training.loop.learning import Learning
from quark.training.loop.optimization import load_optimizer_tensors, optimizer_tensors
from quark.training.loop.outputs import Outputs
from quark.training.loop.result import make_result
from quark.training.loop.round_figures import durations, sample_figures, summary
from quark.training.loop.round_samples import RoundSamples
from quark.training.loop.rounds import Rounds
from quark.training.position import Position
from quark.training.processes.process_group import ProcessGroup
from quark.training.state.checkpoint import Checkpoint, model_tensors
from quark.training.state.run_state import PoolState, RunState


class Trainer:
    """Runs the loop. Built by ``assemble``, which knows every class; here only their contracts are used.

    Args:
        rounds: how many, and what happens after which.
        exploring: the pool and what fills it.
        learning: the policy and what trains it.
        evaluating: the held-out prompts and what measures on them.
        outputs: where results go.
        alerts: watch the rounds.
        processes: the processes that run this loop together; all decide alike, and the main process alone writes.
        position: where the run is. The trainer alone moves it, or passes it to the part that does.
        resume_from: the checkpoint to go on from, whose position this is.
    """

    def __init__(
        self,
        *,
        rounds: Rounds,
        exploring: Exploring,
        learning: Learning,
        evaluating: Evaluating,
        outputs: Outputs,
        alerts: Alerts,
        processes: ProcessGroup,
        position: Position,
        resume_from: Checkpoint | None,
    ) -> None:
        self._rounds = rounds
        self._exploring = exploring
        self._learning = learning
        self._evaluating = evaluating
        self._outputs = outputs
        self._alerts = alerts
        self._processes = processes
        self._resume_from = resume_from
        self._journal = outputs.journal
        self._position = position
        self._learns_from: int | None = None
        self._stop_requested = False
        self._is_stopping = False

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
                self._journal.write_stop("interrupted", "asked to stop")
            return result
        except BaseException as error:
            kind = "failed" if isinstance(error, Exception) else "interrupted"
            self._journal.write_stop(kind, f"{type(error).__name__}: {error}".rstrip(": "))
            raise
        finally:
            try:
                self._journal.close()
            finally:
                self._exploring.pool.close()

    def _run(self) -> TrainingResult:
        if self._resume_from is not None:
            self._restore(self._resume_from)
        here = self._position
        # Unfinished checkpoints of a killed process could fill the disk before the next checkpoint.
        if self._processes.is_main_process:
            self._outputs.checkpoints.prune()
        if here.baseline is None and not self._should_stop():
            here.baseline = self._evaluating.baseline()
        last: Evaluation | None = None
        while here.round < self._rounds.number and not self._should_stop():
            last = self._run_round()
        if self._should_stop():
            return self._interrupted()
        return self._finish(last)

    def _should_stop(self) -> bool:
        """Whether any process was asked to stop; all get the same answer, and keep to it."""
        self._is_stopping = self._is_stopping or self._processes.any(self._stop_requested)
        return self._is_stopping

    def _run_round(self) -> Evaluation | None:
        """One round from wherever it is; returns its evaluation where one is due and it was finished."""
        here, meter = self._position, self._learning.meter
        begin = time.monotonic()
        if here.step_in_round == 0:  # else a resumed run samples nothing before its next step
            self._learning.hooks.before_exploration(here.round)
        with self._learning.hooks.sampling():
            exploration = self._exploring.explore(here, self._should_stop)
        if not exploration.is_complete:
            return None
        explored = time.monotonic()
        samples = self._exploring.rank(exploration)
        self._learns_from = samples.pool.snapshot.generation
        alerts = self._check_first_rewards(samples) + self._check_quantiles(samples)
        if here.step_in_round == 0 and not here.fresh:
            here.fresh = meter.fresh(
                samples.pool, samples.quantization, samples.new, bounds=here.previous_bounds
            )
        held_out = meter.held_out(samples.pool, samples.quantization)
        self._learning.learn(samples, held_out, here, self._should_stop)
        if not self._learning.is_done(here):
            return None
        metrics = self._sample_figures(samples) | here.means() | here.fresh
        metrics |= meter.measure_held_out(held_out)
        if self._learning.config.run.brake_every_steps is not None:
            metrics["steps_braked"] = here.steps_braked
        metrics |= durations(exploration, exploring=explored - begin)
        metrics["seconds_learning"] = time.monotonic() - explored
        evaluation = None
        is_last = here.round + 1 == self._rounds.number
        if is_last or (here.round + 1) % self._rounds.evaluate_every == 0:
            with self._learning.hooks.sampling():
                evaluation = self._evaluating.best()
            self._learning.hooks.after_evaluation(evaluation)
            metrics |= {f"evaluation_{k}": v for k, v in evaluation.metrics.items()}
            metrics |= {f"{name}_evaluation": v for name, v in evaluation.judges.items()}
        with self._learning.hooks.sampling():
            gap = self._evaluating.control_gap(evaluation, is_last=is_last)
        if gap is not None:
            metrics["control_gap"] = gap.value
        self._report_round(samples, metrics)
        alerts += self._check_alerts(metrics, gap)
        self._end_round(samples, evaluation, alerts, is_last=is_last)
        return evaluation

    def _end_round(
        self,
        samples: RoundSamples,
        evaluation: Evaluation | None,
        alerts: list[Alert],
        *,
        is_last: bool,
    ) -> None:
        """Move on to the next round, with a checkpoint where one is due."""
        here = self._position
        here.begin_round(here.round + 1)
        if self._learning.meter.measures_fresh:
            here.previous_bounds = samples.quantization.lower_bounds.tolist()
        self._learns_from = None
        is_stopped = bool(alerts) and self._rounds.stops_at_alert and not is_last
        if is_last or is_stopped or here.round % self._rounds.checkpoint_every == 0:
            self._save(score=evaluation.metrics["reward_mean"] if evaluation is not None else None)
        if is_stopped:
            raise TrainingError(
                f"alerts.stop is set and there is an alert ({alerts[0].text}). A checkpoint of step "
                f"{here.step} was written; the same command goes on from it until the next alert"
            )

    # Report

    def _check_first_rewards(self, samples: RoundSamples) -> list[Alert]:
        """Report problems with the first rewards and return the alerts."""
        if self._position.round:
            return []
        rewards = samples.pool.scores(REWARD_COLUMN)[samples.new.start : samples.new.stop]
        return self._tell(self._alerts.check_first_rewards(rewards))

    def _check_quantiles(self, samples: RoundSamples) -> list[Alert]:
        """Tell of quantiles that are empty because each prompt is ranked for itself, and return it."""
        if not self._exploring.ranking.per_prompt:
            return []
        counts = samples.quantization.counts
        prompts = samples.pool.column("prompt_id")[samples.quantization.labels() >= 0]
        most = int(np.unique(prompts, return_counts=True)[1].max())
        return self._tell(self._alerts.check_quantiles(counts, most_of_a_prompt=most))

    def _check_alerts(self, metrics: Mapping[str, object], gap: ControlGap | None) -> list[Alert]:
        """Tell what has begun to be wrong, and return it."""
        baseline = self._position.baseline
        assert baseline is not None, "it is measured before the first round"
        return self._tell(self._alerts.check(metrics, baseline=baseline.metrics, gap=gap))

    def _tell(self, alerts: list[Alert]) -> list[Alert]:
        for alert in alerts:
            self._journal.alert(alert)
        return alerts

    def _sample_figures(self, samples: RoundSamples) -> dict[str, object]:
        return sample_figures(
            samples,
            self._exploring.ranking,
            self._learning.policy,
            skipped_steps=self._position.skipped_in_round,
        )

    def _report_round(self, samples: RoundSamples, metrics: Mapping[str, object]) -> None:
        self._journal.write("round", time_s=self._journal.elapsed(), **metrics)
        self._journal.summarize(
            summary(
                samples,
                metrics,
                self._learning.policy,
                round=self._position.round,
                num_rounds=self._rounds.number,
                count=self._rounds.samples_shown,
            )
        )

    # Save and restore

    def _save(self, *, score: float | None = None) -> None:
        """Make a checkpoint; ``score`` is the held-out reward of just these weights."""
        here, learning = self._position, self._learning
        self._journal.progress("saving")
        model = learning.policy.model
        weights = learning.weights.full_tensors(model_tensors(model))
        optimizer = learning.weights.full_tensors(
            optimizer_tensors(learning.learner.optimizer, model)
        )
        hooked = learning.weights.full_tensors(learning.hooks.tensors())
        if not self._processes.is_main_process:
            return
        snapshot = self._exploring.pool.snapshot
        # Parameters only: a buffer may hold infinities on purpose, a causal mask for one.
        parameters = {n: weights[n] for n, _ in model.named_parameters() if n in weights}
        require_finite({**parameters, **optimizer, **hooked}, step=here.step)
        state = RunState(
            step=here.step,
            score=score,
            run_id=self._outputs.run_id,
            position=dataclasses.replace(here, seconds=self._journal.elapsed()),
            objective=learning.objective.state_dict(),
            hooks=learning.hooks.state(),
            alerts=self._alerts.state(),
            pool=PoolState(
                generation=snapshot.generation,
                hash=snapshot.hash,
                samples=snapshot.num_samples,
                learns_from=self._learns_from,
            ),
            metrics_bytes=self._journal.sync(),
            fingerprint=self._outputs.fingerprint,
        )
        self._outputs.checkpoints.save(state, weights=weights, optimizer=optimizer, hooks=hooked)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take up everything that a checkpoint holds but the position, which the trainer was given."""
        state, learning = checkpoint.state, self._learning
        bounds, num_quantiles = state.position.previous_bounds, learning.config.pool.num_quantiles
        if bounds is not None and len(bounds) != num_quantiles:
            raise CheckpointError(
                f"{checkpoint.path} has the bounds of {len(bounds)} quantiles, and the run has {num_quantiles}: it is "
                "damaged or belongs to another run. Move it away to resume from an earlier one"
            )
        checkpoint.load_model(learning.policy.model)
        load_optimizer_tensors(
            learning.learner.optimizer, learning.policy.model, checkpoint.optimizer_tensors()
        )
        try:
            learning.objective.load_state_dict(state.objective)
            learning.hooks.load(state.hooks, checkpoint.hook_tensors())
        except KeyError as err:
            raise CheckpointError(
                f"{checkpoint.path} lacks {err}, which this objective or a hook carries from step to step"
            ) from err
        if state.alerts is not None:
            self._alerts.restore(state.alerts)
        self._learns_from = state.pool.learns_from

    # End

    def _interrupted(self) -> TrainingResult:
        here = self._position
        if here.baseline is not None:
            self._save()
        where = f"in round {here.round}"
        if here.round == self._rounds.number:
            where = "before the result was published"
        self._journal.say(f"stopped {where} after {here.step} steps; the same command resumes")
        return self._result(None, [], interrupted=True)

    def _finish(self, best: Evaluation | None) -> TrainingResult:
        """Control curve, the saved model, and the closing row; or an interruption before the model is published."""
        if best is None:
            # Killed between the last checkpoint and this: the log has this evaluation's row already.
            with self._learning.hooks.sampling():
                best = self._evaluating.best(is_logged=True)
        curve: list[float] = []
        if self._rounds.has_control_curve:
            lower: list[Evaluation] = []
            for quantile in range(self._evaluating.num_quantiles - 1):
                if self._should_stop():
                    return self._interrupted()
                with self._learning.hooks.sampling():
                    lower.append(self._evaluating.quantile(quantile))
            curve = [evaluation.metrics["reward_mean"] for evaluation in (*lower, best)]
            self._journal.write("control_curve", reward_mean=curve)
            if lower:
                self._check_alerts({}, ControlGap.between(best.rewards, lower[0].rewards))
        self._journal.progress("saving")
        if self._should_stop():
            return self._interrupted()
        result = self._result(best, curve, interrupted=False)
        weights = self._learning.weights
        with self._learning.hooks.sampling(), weights.gathered():
            if self._processes.is_main_process:
                self._outputs.publish(weights.local_policy, result)
        self._journal.write_end(dataclasses.asdict(result))
        return result

    def _result(
        self, best: Evaluation | None, curve: list[float], *, interrupted: bool
    ) -> TrainingResult:
        return make_result(
            self._outputs.directory,
            self._position,
            num_samples=len(self._exploring.pool),
            seconds=self._journal.elapsed(),
            best=best,
            shown=[] if best is None else self._evaluating.shown(best),
            curve=curve,
            interrupted=interrupted,
        )
