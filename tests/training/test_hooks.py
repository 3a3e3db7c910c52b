"""Weight hooks: which points of a run call them, and that checkpoints keep their state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quark.config.load import load_config
from quark.training.assemble import assemble
from quark.training.loop.hooks import WeightHook
from quark.training.loop.round_samples import RoundSamples
from quark.training.loop.trainer import Trainer
from quark.types import Json
from tests.training.tiny_run import NUM_ROUNDS, STEPS_PER_ROUND, Listener, write_inputs

NUM_STEPS = NUM_ROUNDS * STEPS_PER_ROUND


class Counter(WeightHook):
    """Counts steps over all processes of a run, and notes what it is told in this one."""

    name = "counter"

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.num_steps = 0

    def on_start(self, samples: RoundSamples) -> None:
        self.told.append(("start", len(samples.pool)))

    def after_step(self, step: int) -> None:
        self.told.append(("step", step))
        self.num_steps += 1

    def before_exploration(self, round: int) -> None:
        self.told.append(("exploration", round))

    def state(self) -> Mapping[str, Json]:
        return {"num_steps": self.num_steps}

    def load(self, state: Mapping[str, Json]) -> None:
        assert isinstance(state["num_steps"], int)
        self.num_steps = state["num_steps"]


def trainer_with(hook: WeightHook, config: Path, run_dir: Path, *overrides: str) -> Trainer:
    trainer = assemble(load_config(config, overrides), run_dir, listener=Listener())
    trainer._learning.hooks._hooks = (hook,)
    return trainer


def test_a_hook_is_called_before_explorations_at_the_start_and_after_every_step(
    tmp_path: Path,
) -> None:
    hook = Counter()
    trainer_with(hook, write_inputs(tmp_path), tmp_path / "run").run()
    explorations = [number for what, number in hook.told if what == "exploration"]
    assert explorations == list(range(NUM_ROUNDS))
    assert [number for what, number in hook.told if what == "step"] == list(range(NUM_STEPS))
    assert [what for what, _ in hook.told[:3]] == ["exploration", "start", "step"]
    assert sum(what == "start" for what, _ in hook.told) == 1


def test_a_resumed_run_gives_a_hook_its_state_back(tmp_path: Path) -> None:
    config, run_dir = write_inputs(tmp_path), tmp_path / "run"
    trainer_with(Counter(), config, run_dir, "run.num_rounds=1").run()
    hook = Counter()
    trainer_with(hook, config, run_dir).run()
    assert hook.num_steps == NUM_STEPS
    assert ("step", 0) not in hook.told


def test_a_run_stopped_within_a_round_does_not_announce_its_exploration_again(
    tmp_path: Path,
) -> None:
    config, run_dir = write_inputs(tmp_path), tmp_path / "run"

    class Stopping(Counter):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == STEPS_PER_ROUND:
                stopped.request_stop()

    first, second = Stopping(), Counter()
    stopped = trainer_with(first, config, run_dir)
    assert stopped.run().interrupted
    trainer_with(second, config, run_dir).run()
    told = [event for hook in (first, second) for event in hook.told]
    assert [number for what, number in told if what == "exploration"] == list(range(NUM_ROUNDS))
    assert [number for what, number in told if what == "step"] == list(range(NUM_STEPS))
