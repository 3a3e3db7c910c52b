"""The settling steps as a hook: they come before the run's first optimizer step."""

from __future__ import annotations

from quark.config.schema import RunConfig
from quark.training.loop.draws import settling_sampler
from quark.training.loop.hooks import WeightHook
from quark.training.loop.journal import Journal
from quark.training.loop.learner import Learner
from quark.training.loop.round_samples import RoundSamples
from quark.training.position import Position


class Settling(WeightHook):
    """Shifts the reward tokens' vectors once in a run's life; the position keeps whether that was done.

    Args:
        learner: makes the passes.
        config: how many steps, on which samples.
        pad_id: fills minibatches up.
        position: says whether the steps are still to be made, and remembers that they were.
        journal: gets the costs.
    """

    name = "settling"

    def __init__(
        self,
        learner: Learner,
        config: RunConfig,
        *,
        pad_id: int,
        position: Position,
        journal: Journal,
    ) -> None:
        self._learner = learner
        self._config = config
        self._pad_id = pad_id
        self._position = position
        self._journal = journal

    def on_start(self, samples: RoundSamples) -> None:
        """Make the settling steps and log their costs, unless they were made or the run has taken a step."""
        here = self._position
        if here.are_tokens_settled or here.step > 0:
            return
        sampler = settling_sampler(samples.pool, samples.quantization, self._config)
        steps = range(self._config.optimizer.settling_steps)
        costs = self._learner.settle([sampler.batch(i, pad_id=self._pad_id) for i in steps], here)
        here.are_tokens_settled = True
        self._journal.write("settling", time_s=self._journal.elapsed(), kl_by_step=costs)
