"""No number that is not finite and no lack of memory spoils a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quark.cli.exit_codes import ExitCode, exit_code_of
from quark.config.load import load_config
from quark.errors import ModelError, QuarkError, TrainingError
from quark.evaluation.evaluator import Evaluator
from quark.models.batch import TrainingBatch
from quark.objectives.quark import LossOutput, QuarkObjective
from quark.run_directory import RunDirectory
from quark.training.assemble import assemble
from quark.training.loop.exploration import Explorer
from quark.training.loop.guards import require_finite
from quark.training.loop.trainer import Trainer
from quark.training.processes.memory import is_out_of_memory, run_within_memory
from quark.training.state.checkpoint import Checkpoints
from tests.training.tiny_run import (
    STEPS_PER_ROUND,
    Listener,
    fingerprint_of,
    rows_of,
    train,
    write_inputs,
)

Change = Callable[[Trainer, TrainingBatch, LossOutput], Tensor]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def expected(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(config, run_dir)
    return fingerprint_of(run_dir)


@contextmanager
def losses_changed_by(change: Change) -> Iterator[Callable[..., Trainer]]:
    """Trainers whose loss of every part is what ``change`` makes of it."""
    compute = QuarkObjective.__call__

    def assembled(
        config: Path, run_dir: Path, *overrides: str, listener: Listener | None = None
    ) -> Trainer:
        trainer = assemble(load_config(config, overrides), run_dir, listener=listener or Listener())

        def changed(self: QuarkObjective, *args: Any, **kwargs: Any) -> LossOutput:
            output = compute(self, *args, **kwargs)
            object.__setattr__(output, "loss", change(trainer, args[2], output))
            return output

        QuarkObjective.__call__ = changed  # type: ignore[method-assign]
        return trainer

    try:
        yield assembled
    finally:
        QuarkObjective.__call__ = compute  # type: ignore[method-assign]


def ask_for_too_much() -> None:
    torch.empty(1 << 60)


def hungry(trainer: Trainer, part: TrainingBatch, output: LossOutput) -> Tensor:
    if part.num_sequences > 2:
        ask_for_too_much()
    return output.loss


def test_only_what_says_so_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as real:
        ask_for_too_much()
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_sizes_are_halved_until_one_suffices() -> None:
    tried: list[int] = []

    def attempt(size: int) -> str:
        tried.append(size)
        if size > 3:
            ask_for_too_much()
        return "done"

    told: list[int] = []
    result = run_within_memory(attempt, 13, on_smaller=lambda size, reason: told.append(size))
    assert result == ("done", 3)
    assert (tried, told) == ([13, 6, 3], [6, 3])


def test_other_errors_are_not_retried() -> None:
    def attempt(size: int) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_within_memory(attempt, 8, on_smaller=lambda size, reason: None)


def test_a_step_without_memory_is_redone_in_smaller_parts_and_the_size_is_kept(
    config: Path, tmp_path: Path
) -> None:
    train(config, tmp_path / "small", overrides=("optimizer.micro_batch_size=2",))
    listener = Listener()
    with losses_changed_by(hungry) as assembled:
        assembled(config, tmp_path / "run", listener=listener).run()
    rows = rows_of(tmp_path / "run")
    alerts = [r for r in rows if r["event"] == "alert" and r["kind"] == "out_of_memory"]
    assert [(r["step"], r["value"]) for r in alerts] == [(0, 2)]
    assert any("optimizer.micro_batch_size = 2" in message for message in listener.messages)
    steps = [r for r in rows if r["event"] == "step"]
    assert {r["micro_batch_size"] for r in steps} == {2}
    assert not any(r["is_skipped"] for r in steps)
    # The same parts as where 2 is configured, so even the rounding is the same.
    small = [r for r in rows_of(tmp_path / "small") if r["event"] == "step"]
    assert steps == small


def test_a_step_that_fails_half_way_is_redone_from_nothing(
    config: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    parts = 0

    def fails_once(trainer: Trainer, part: TrainingBatch, output: LossOutput) -> Tensor:
        nonlocal parts
        parts += trainer._position.step == 1
        if parts == 2:  # of three; the first one's gradient is there
            parts += 1
            ask_for_too_much()
        return output.loss

    with losses_changed_by(fails_once) as assembled:
        assembled(config, tmp_path / "run").run()
    steps = [r for r in rows_of(tmp_path / "run") if r["event"] == "step"]
    assert [r["micro_batch_size"] for r in steps[:3]] == [4, 2, 2]
    whole = [r for r in expected["rows"] if r["event"] == "step"]
    for figure in ("loss", "grad_norm", "kl_policy_to_reference", "kl_coef"):
        # The first round's: later ones sample from weights that differ by rounding.
        found = [r[figure] for r in steps[:STEPS_PER_ROUND]]
        assert found == pytest.approx([r[figure] for r in whole[:STEPS_PER_ROUND]], rel=1e-4)


def test_a_smaller_micro_batch_survives_a_resume(config: Path, tmp_path: Path) -> None:
    with losses_changed_by(hungry) as assembled:
        assembled(config, tmp_path / "whole").run()
        trainer = assembled(
            config,
            tmp_path / "run",
            listener=(listener := Listener()),
        )
        listener.at_event = lambda number: trainer.request_stop() if number >= 21 else None
        assert trainer.run().interrupted
        again = Listener()
        assembled(config, tmp_path / "run", listener=again).run()
    assert not any("ran out of memory" in message for message in again.messages)
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(tmp_path / "whole")


def test_no_memory_for_one_sequence_ends_the_run_with_its_checkpoint(
    config: Path, tmp_path: Path
) -> None:
    def starved(trainer: Trainer, part: TrainingBatch, output: LossOutput) -> Tensor:
        if trainer._position.step == STEPS_PER_ROUND + 1:
            ask_for_too_much()
        return output.loss

    with losses_changed_by(starved) as assembled:
        trainer = assembled(config, tmp_path / "run", "optimizer.micro_batch_size=1")
        with pytest.raises(TrainingError, match="a single sequence") as error:
            trainer.run()
    assert exit_code_of(error.value) is ExitCode.INPUT
    newest, rejected = Checkpoints(RunDirectory(tmp_path / "run").checkpoints, keep_last=2).newest()
    assert newest is not None
    assert (newest.step, rejected) == (STEPS_PER_ROUND, [])


@pytest.mark.parametrize(
    ("owner", "method", "work"),
    [(Explorer, "_generate", "sampling"), (Evaluator, "likelihoods", "evaluating")],
)
def test_no_memory_elsewhere_names_the_setting_that_asks_for_less(
    config: Path,
    tmp_path: Path,
    owner: type,
    method: str,
    work: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, method, lambda *args, **named: ask_for_too_much())
    with pytest.raises(TrainingError, match=rf"not enough memory for {work}.*sampling\.batch_size"):
        train(config, tmp_path / "run")


def poisoned_at(*steps: int, place: str) -> Change:
    """NaN in the loss or in one number of the gradient, infinity in one weight or moment, at these steps."""

    def change(trainer: Trainer, part: TrainingBatch, output: LossOutput) -> Tensor:
        if trainer._position.step not in steps:
            return output.loss
        if place == "loss":
            return output.loss * math.nan
        weight = trainer._learning.policy.model.get_input_embeddings().weight
        if place == "weight":
            with torch.no_grad():
                weight[0, 0] = math.inf
            return output.loss
        if place == "moment":
            trainer._learning.learner.optimizer.state[weight]["exp_avg_sq"][0, 0] = math.inf
            return output.loss
        return output.loss + 0.0 * (weight[0, 0] - weight[0, 0].detach()).sqrt()

    return change


@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("steps", [(0,), (3, 4, 5), (11,)], ids=str)
def test_what_is_not_finite_never_reaches_weights_optimizer_or_checkpoint(
    config: Path, tmp_path: Path, place: str, steps: tuple[int, ...]
) -> None:
    listener = Listener()
    with losses_changed_by(poisoned_at(*steps, place=place)) as assembled:
        trainer = assembled(config, tmp_path / "run", listener=listener)
        result = trainer.run()
    rows = rows_of(tmp_path / "run")
    assert [r["step"] for r in rows if r["event"] == "step" and r["is_skipped"]] == list(steps)
    by_round = [sum(s // STEPS_PER_ROUND == number for s in steps) for number in range(3)]
    assert [r["skipped_steps"] for r in rows if r["event"] == "round"] == by_round
    assert [summary.metrics["skipped_steps"] for summary in listener.rounds] == by_round
    assert result.metrics["skipped_steps"] == len(steps)
    assert sum("is skipped" in message for message in listener.messages) == len(steps)
    newest, _ = Checkpoints(RunDirectory(tmp_path / "run").checkpoints, keep_last=2).newest()
    assert newest is not None
    require_finite(newest.optimizer_tensors(), step=12)
    require_finite(trainer._learning.policy.model.state_dict(), step=12)
    newest.load_model(trainer._learning.policy.model)
    require_finite(trainer._learning.policy.model.state_dict(), step=12)


def test_skipped_steps_are_counted_alike_after_a_resume(config: Path, tmp_path: Path) -> None:
    with losses_changed_by(poisoned_at(1, 4, 5, 6, place="loss")) as assembled:
        assembled(config, tmp_path / "whole", "optimizer.max_skipped_steps=3").run()
        interrupted = True
        while interrupted:
            listener = Listener()
            trainer = assembled(
                config, tmp_path / "run", "optimizer.max_skipped_steps=3", listener=listener
            )
            listener.at_event = lambda number, t=trainer: t.request_stop() if number >= 7 else None
            interrupted = trainer.run().interrupted
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("place", "step", "error_type", "message"),
    [
        ("weight", 5, TrainingError, "2 steps in a row"),
        ("weight", 7, ModelError, "its weights are broken"),  # the evaluation meets it first
        ("moment", 7, TrainingError, "exp_avg_sq is not finite after step 8: no checkpoint"),
    ],
)
def test_a_weight_or_moment_that_is_not_finite_ends_the_run_and_the_last_checkpoint_goes_on(
    config: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    place: str,
    step: int,
    error_type: type[QuarkError],
    message: str,
) -> None:
    run_dir = tmp_path / "run"
    with losses_changed_by(poisoned_at(step, place=place)) as assembled:
        trainer = assembled(config, run_dir, "optimizer.max_skipped_steps=1")
        with pytest.raises(error_type, match=message) as error:
            trainer.run()
    assert exit_code_of(error.value) is ExitCode.INPUT
    names = [path.name for path in RunDirectory(run_dir).checkpoints.iterdir()]
    assert names == [f"step-{STEPS_PER_ROUND:08d}"]
    train(config, run_dir)
    assert fingerprint_of(run_dir) == expected
