"""Hooks: the points at which code other than the optimizer may change or publish the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol

from torch import Tensor

from quark.evaluation.evaluator import Evaluation
from quark.training.loop.round_samples import RoundSamples
from quark.types import Json


class WeightHook(Protocol):
    """Is called by all processes together, in the order in which the run lists its hooks.

    A subclass defines the points that it needs. What it has to remember is its ``state``, which checkpoints keep
    under its ``name``.
    """

    name: str

    def on_start(self, samples: RoundSamples) -> None:  # noqa: ARG002 - most need one point
        """Before the first optimizer step that this process takes, a resumed run's too.

        Args:
            samples: what the round under way learns from.
        """
        return

    def after_step(self, step: int) -> None:  # noqa: ARG002
        """After optimizer step ``step``, skipped ones included."""
        return

    def before_exploration(self, round: int) -> None:  # noqa: ARG002
        """Before the policy is sampled in ``round``; again where a run stops before that round's first step and resumes."""
        return

    def sampling(self) -> AbstractContextManager[None]:
        """Within: the policy has the weights that are sampled, evaluated and published. No step is taken in it."""
        return nullcontext()

    def after_evaluation(self, evaluation: Evaluation) -> None:  # noqa: ARG002
        """After the policy was measured under the best token at the end of a round."""
        return

    def state(self) -> Mapping[str, Json]:
        """What a resumed run needs; empty for nothing."""
        return {}

    def load(self, state: Mapping[str, Json]) -> None:  # noqa: ARG002
        """Take up a state that ``state`` gave. Is called before every other point."""
        return

    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors that a resumed run needs, by name, laid out over the processes as the weights are."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        """Take up whole tensors that ``tensors`` gave. Is called after ``load``."""
        return


class WeightHooks:
    """The hooks of a run, in order."""

    def __init__(self, *hooks: WeightHook) -> None:
        self._hooks = hooks
        self._has_started = False

    def start(self, samples: RoundSamples) -> None:
        """Call ``on_start`` once in this process."""
        if not self._has_started:
            self._has_started = True
            for hook in self._hooks:
                hook.on_start(samples)

    def after_step(self, step: int) -> None:
        """Call each hook's ``after_step``."""
        for hook in self._hooks:
            hook.after_step(step)

    def before_exploration(self, round: int) -> None:
        """Call each hook's ``before_exploration``."""
        for hook in self._hooks:
            hook.before_exploration(round)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Enter each hook's ``sampling``."""
        with ExitStack() as stack:
            for hook in self._hooks:
                stack.enter_context(hook.sampling())
            yield

    def after_evaluation(self, evaluation: Evaluation) -> None:
        """Call each hook's ``after_evaluation``."""
        for hook in self._hooks:
            hook.after_evaluation(evaluation)

    def state(self) -> dict[str, Mapping[str, Json]]:
        """By name, without hooks that have none."""
        return {hook.name: state for hook in self._hooks if (state := hook.state())}

    def tensors(self) -> dict[str, Tensor]:
        """All hooks' tensors, named ``<hook>/<tensor>``."""
        return {
            f"{hook.name}/{name}": tensor
            for hook in self._hooks
            for name, tensor in hook.tensors().items()
        }

    def load(
        self, states: Mapping[str, Mapping[str, Json]], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Give each hook the state and the tensors under its name; hooks without a state are left as they are."""
        for hook in self._hooks:
            if hook.name in states:
                hook.load(states[hook.name])
                prefix = f"{hook.name}/"
                hook.load_tensors(
                    {
                        name.removeprefix(prefix): tensor
                        for name, tensor in (tensors or {}).items()
                        if name.startswith(prefix)
                    }
                )
