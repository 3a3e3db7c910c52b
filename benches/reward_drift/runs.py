"""The runs of the methods, each in the process that calls it."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reward_drift.meter import Meter, peak_mib
from reward_drift.task import Point, Task


def quark_points(task: Task, folder: Path) -> Iterator[Point]:
    """A whole run of quark, measured afterwards from its checkpoints."""
    from quark.config.load import load_config
    from quark.training.assemble import assemble
    from quark.training.events import Progress, RoundSummary, Silence
    from quark.training.factories import take_critic
    from quark.training.state.checkpoint import verify

    settings = task.overrides(folder)
    section = load_config("demo", settings).config.run
    first = section.prompts_first_round * section.completions_per_prompt
    later = section.prompts_per_round * section.completions_per_prompt
    # Learning from the last budget's samples is in the run; sampling more of them is not.
    num_rounds = 1 + math.ceil((max(task.budgets) - first) / later)
    settings = (*settings, f"run.num_rounds={max(1, num_rounds)}")
    spent: dict[int, tuple[int, float]] = {}
    """By step: scored samples and seconds."""

    class Clock(Silence):
        begin = time.process_time()

        def on_progress(self, progress: Progress) -> None:
            if progress.phase == "exploring" and progress.round == 0 and progress.done == 0:
                self.begin = time.process_time()  # the original model has been measured

        def on_round(self, summary: RoundSummary) -> None:
            step = (summary.round + 1) * section.steps_per_round
            spent[step] = int(summary.metrics["samples"]), time.process_time() - self.begin

    run = folder / "run"
    assemble(load_config("demo", settings), run, listener=Clock()).run()
    meter = Meter(task, settings)
    for step, (samples, seconds) in spent.items():
        if samples not in task.budgets:
            continue
        checkpoint = verify(run / "checkpoints" / f"step-{step:08d}")
        checkpoint.load_model(meter.policy.model)
        take_critic(checkpoint, meter.policy)
        yield from meter.points(meter.policy, samples, seconds, guidance=task.guidance)


def trl_points(task: Task, folder: Path) -> Iterator[Point]:
    """TRL's GRPO or RLOO, 128 samples a step, measured at every budget."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from quark.models.loading import load_base_model, load_tokenizer

    kinds = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
    make_config, make_trainer = kinds[task.contender.kind]
    values = dict(setting.split("=") for setting in task.contender.settings)
    meter = Meter(task, without_settings(task).overrides(folder))
    plain = load_tokenizer(meter.config.model)
    plain.pad_token = plain.pad_token or plain.eos_token
    model_dir = folder / "model"
    model = load_base_model(meter.config.model)
    model.save_pretrained(model_dir)
    plain.save_pretrained(model_dir)
    scored = 0

    def sentiment(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        nonlocal scored
        scored += len(completions)
        scores = meter.rewards.reward(prompts=prompts, completions=completions)
        return [float(score) for score in scores if score is not None]

    config = make_config(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=meter.config.optimizer.batch_size * 2,
        num_generations=int(values["num_generations"]),
        max_completion_length=meter.config.sampling.max_new_tokens,
        temperature=1.0,
        top_k=0,
        beta=float(values["beta"]),
        learning_rate=float(values["learning_rate"]),
        lr_scheduler_type=values["schedule"],
        max_steps=max(task.budgets) // (meter.config.optimizer.batch_size * 2),
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        seed=task.seed,
    )
    weights: dict[int, tuple[dict[str, Any], float]] = {}
    begin = 0.0

    class Keep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: object, model: torch.nn.Module, **__: object) -> None:
            if scored in task.budgets:
                state_dict = model.state_dict()
                copied = {name: value.clone() for name, value in state_dict.items()}
                weights[scored] = copied, time.process_time() - begin

    trainer = make_trainer(
        model=str(model_dir),
        reward_funcs=sentiment,
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": prompt.text} for prompt in meter.prompts.train]
        ),
        processing_class=plain,
        callbacks=[Keep()],
    )
    begin = time.process_time()
    trainer.train()
    for samples, (state_dict, seconds) in weights.items():
        model.load_state_dict(state_dict)
        model.eval()
        with torch.no_grad():
            yield from meter.points(
                meter.without_token(model), samples, seconds, is_conditioned=False
            )


def without_settings(task: Task) -> Task:
    """``task`` without settings that are not quark's."""
    return dataclasses.replace(task, contender=dataclasses.replace(task.contender, settings=()))


def best_of_n_points(task: Task, folder: Path) -> Iterator[Point]:
    """The best of n answers of the original model. KL is log n - (n - 1) / n, exact where no two rewards are equal."""
    from quark.generation.transformers_generator import TransformersGenerator
    from quark.text_statistics import distinct_n

    meter = Meter(task, task.overrides(folder))
    generator = TransformersGenerator(
        meter.reference.causal,
        meter.policy.tokenizer,
        meter.policy.reward_tokens,
        meter.config.sampling,
        meter.device,
    )
    for n in (1, 2, 4, 8, 16, 32, 64):
        begin = time.process_time()
        prompts = [p for p in meter.prompts.evaluation for _ in range(2 * n)]
        with meter.autocast():
            found = generator.generate(prompts, quantile=None, seed=task.seed)
        texts = [c.text for c in found]
        scores = np.array(
            meter.rewards.reward(prompts=[p.text for p in prompts], completions=texts), dtype=float
        ).reshape(-1, n)
        best = [found[i * n + int(j)] for i, j in enumerate(scores.argmax(axis=1))]
        lengths = [len(c.token_ids) for c in best]
        drift = math.log(n) - (n - 1) / n
        yield Point(
            method=task.contender.method,
            settings=f"n={n}",
            seed=task.seed,
            samples=n,
            guidance=0.0,
            reward=float(scores.max(axis=1).mean()),
            kl_per_completion=drift,
            kl_per_token=drift / float(np.mean(lengths)),
            distinct_2=distinct_n([c.text for c in best], 2),
            length=float(np.mean(lengths)),
            perplexity=math.nan,
            cpu_seconds=time.process_time() - begin,
            peak_mib=peak_mib(),
        )


def child(task: Task) -> list[Point]:
    """All points of one run."""
    import torch

    torch.set_num_threads(1)
    make = {"quark": quark_points, "best-of-n": best_of_n_points}.get(
        task.contender.kind, trl_points
    )
    with tempfile.TemporaryDirectory() as folder:
        return list(make(task, Path(folder)))
