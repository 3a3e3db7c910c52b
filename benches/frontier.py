"""Reward against drift at equal numbers of scored samples: `python benches/frontier.py --trl FOLDER`.

quark's objectives, TRL's GRPO and RLOO, RAFT and best-of-n learn the same task: the embedded model, the embedded
sentiment scorer, the embedded prompts, completions of at most 16 tokens. Each run is a process of its own, on one
thread. At 256, 512, 1,024, 2,048 and 4,096 scored samples its model is measured on held-out prompts, quark's at several
strengths of guidance. The axes are the reward and KL(q || p0) in nats per completion, of the distribution q that is
sampled. All methods are measured by the same code.

TRL is no dependency of quark. Give the folder it is installed in:

    pip install --target trl --no-deps trl datasets xxhash dill multiprocess
    python benches/frontier.py --trl trl --json points.json --picture frontier.png

`--quick` takes one seed, up to 512 samples, no sweep and no sums of terms. `--tune` measures on 128 of the training
prompts instead, and trains on the others: settings are chosen there. `--contender "NAME: key=value ..."` adds a run of
quark with other settings.

The tables give the reward at a drift: the height there of the concave hull of a run's points, the original model
included. That height is a fact, since sampling from either of two models by a coin has the coin's mean of their rewards
and at most that of their drifts. A peer's runs differ in learning rate, completions a prompt and beta, and the best of
them in the mean over seeds counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from quark.generation.base import Generator
    from quark.models.batch import TrainingBatch
    from quark.models.causal import CompletionRows
    from quark.models.policy import Policy
    from quark.types import Completion, Prompt

BUDGETS = (256, 512, 1024, 2048, 4096)
DRIFTS = (2.0, 3.0, 3.5, 4.0, 5.0, 6.0)
"""Nats per completion at which rewards are compared."""
GUIDANCE = (0.0, 0.1, 0.25, 0.5, 1.0)
TOKENS = 16
NUM_PROMPTS = 128
"""Held-out prompts, each answered twice."""

COMMON = (
    "run.prompts_first_round=64",
    "run.prompts_per_round=64",
    "run.steps_per_round=3",
    "run.chunk_size=64",
    "model.reward_token_std_scale=0",
    "pool.num_quantiles=4",
    "pool.age_half_life=2",
    "optimizer.batch_size=64",
    "optimizer.learning_rate=6e-4",
    "optimizer.schedule=constant",
    "optimizer.reward_token_lr_scale=20",
    "optimizer.warmup_steps=4",
    "evaluation.judges=[]",
    "pool.extra_scores=[]",
)
"""quark's loop for few samples, as in the preset `demo`; a contender's own settings come on top."""
CONTRAST = (
    "objective.lm_coef=0",
    "objective.contrast_coef=1",
    "objective.contrast_tokens=3",
    "objective.kl_coef=0.1",
)
LIKELIHOOD = (
    "objective.lm_coef=1",
    "objective.contrast_coef=0",
    "objective.kl_coef=0.05",
    "model.reward_token_std_scale=1",
    "pool.num_quantiles=5",
    "optimizer.learning_rate=1e-3",
    "optimizer.reward_token_lr_scale=1",
    "run.steps_per_round=8",
)
ADVANTAGE = (
    "objective.lm_coef=0",
    "objective.contrast_coef=0",
    "objective.advantage_coef=1",
    "objective.kl_coef=0.05",
    "optimizer.learning_rate=2e-3",
    "optimizer.reward_token_lr_scale=1",
    "run.completions_per_prompt=8",
    "run.prompts_first_round=8",
    "run.prompts_per_round=8",
    "run.steps_per_round=1",
)
NEWEST = ("pool.last_rounds=1", "pool.age_half_life=none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A method with its settings."""

    method: str
    """What it is called in tables and points; runs of one method are swept, and the best of them counts."""
    kind: str = "quark"
    """``quark``, ``grpo``, ``rloo`` or ``best-of-n``."""
    settings: tuple[str, ...] = ()
    """quark's ``key=value``; a peer's are ``learning_rate``, ``num_generations``, ``beta``, ``schedule``."""

    @property
    def is_annealed(self) -> bool:
        """Whether the learning rate falls to 0 at the last sample, so that every budget takes a run of its own."""
        names = ("schedule=linear", "optimizer.schedule=linear", "optimizer.schedule=cosine")
        return any(name in self.settings for name in names)


QUARK = (
    Contender(method="quark contrast", settings=CONTRAST),
    Contender(method="quark likelihood", settings=LIKELIHOOD),
    Contender(method="quark advantage", settings=(*ADVANTAGE, *NEWEST)),
    Contender(
        method="quark contrast + advantage",
        settings=(*CONTRAST, "objective.advantage_coef=0.05", "objective.advantage_scope=round"),
    ),
    Contender(
        method="quark likelihood + contrast",
        settings=(*CONTRAST, "objective.lm_coef=0.1"),
    ),
)
NEWEST_ROUND = (
    Contender(method="quark contrast, newest round", settings=(*CONTRAST, *NEWEST)),
    Contender(method="quark likelihood, newest round", settings=(*LIKELIHOOD, *NEWEST)),
    Contender(method="quark advantage, replayed", settings=(*ADVANTAGE, "run.steps_per_round=2")),
)
RAFT = Contender(
    method="RAFT",
    settings=(
        "run.completions_per_prompt=4",
        "run.prompts_first_round=16",
        "run.prompts_per_round=16",
        "pool.num_quantiles=4",
        "pool.per_prompt=true",
        "pool.train_quantiles=best",
        *NEWEST,
        "objective.lm_coef=1",
        "objective.contrast_coef=0",
        "objective.kl_coef=0",
        "optimizer.learning_rate=1e-3",
        "optimizer.reward_token_lr_scale=1",
        "model.reward_token_std_scale=1",
    ),
)


def peers(*, is_swept: bool) -> Iterator[Contender]:
    """TRL's trainers, with all combinations of what is swept."""
    rates, generations, betas = ((1e-3, 2e-3, 3e-3), (4, 8), (0.0, 0.05))
    for kind, method in (("grpo", "GRPO"), ("rloo", "RLOO")):
        for rate, num, beta, schedule in itertools.product(
            rates if is_swept else (2e-3,),
            generations if is_swept else (8,),
            betas if is_swept else (0.05,),
            ("constant", "linear") if is_swept else ("constant",),
        ):
            settings = (
                f"learning_rate={rate:g}",
                f"num_generations={num}",
                f"beta={beta:g}",
                f"schedule={schedule}",
            )
            yield Contender(method=method, kind=kind, settings=settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model, measured."""

    method: str
    settings: str
    seed: int
    samples: int
    """Scored so far; of best-of-n, those that each answer costs."""
    guidance: float
    reward: float
    kl_per_completion: float
    kl_per_token: float
    distinct_2: float
    length: float
    perplexity: float
    """Under the original model."""
    cpu_seconds: float
    """Of training so far: sampling, reward, reference and steps; neither loading nor measuring."""
    peak_mib: float


# In the process of one run


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run."""

    contender: Contender
    seed: int
    budgets: tuple[int, ...]
    guidance: tuple[float, ...]
    base: tuple[str, ...]
    is_tuning: bool

    @classmethod
    def parse(cls, text: str) -> Task:
        record = json.loads(text)
        contender = record.pop("contender")
        contender["settings"] = tuple(contender["settings"])
        for key in ("budgets", "guidance", "base"):
            record[key] = tuple(record.get(key, ()))
        return cls(contender=Contender(**contender), **record)

    def overrides(self, folder: Path) -> tuple[str, ...]:
        """The settings of quark's run, and of every measurement."""
        common = [
            f"run.seed={self.seed}",
            f"sampling.max_new_tokens={TOKENS}",
            "evaluation.completions_per_prompt=2",
            "evaluation.control_curve=false",
            "evaluation.every_rounds=100000",
            "checkpoint.keep_last=100000",
        ]
        if self.is_tuning:
            for name, rows in zip(("train", "eval"), tuning_prompts(), strict=True):
                file = folder / f"{name}.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            common += [
                f"prompts.source={folder / 'train.jsonl'}",
                f"prompts.evaluation_source={folder / 'eval.jsonl'}",
            ]
        return (*COMMON, *common, *self.base, *self.contender.settings)


def tuning_prompts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training prompts, 128 of them apart."""
    from quark.assets import asset_path

    rows = [json.loads(line) for line in asset_path("prompts", "reviews").read_text().splitlines()]
    rows = [{"prompt": row["prompt"]} for row in rows if row.get("split") != "eval"]
    order = np.random.default_rng(7).permutation(len(rows))
    return [rows[i] for i in order[NUM_PROMPTS:]], [rows[i] for i in order[:NUM_PROMPTS]]


def peak_mib() -> float:
    """Of this process."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Meter:
    """Measures models on the held-out prompts of a configuration, all in the same way."""

    def __init__(self, task: Task, overrides: Sequence[str]) -> None:
        import torch

        from quark.config.load import load_config
        from quark.training import factories
        from quark.training.processes.devices import make_autocast

        self.task = task
        self.config = load_config("demo", tuple(overrides)).config
        self.device = torch.device("cpu")
        self.policy = factories.untrained_policy(self.config, self.device)
        self.reference = factories.frozen_reference(self.config, self.policy, self.device)
        self.autocast = make_autocast(self.config.run.precision, self.device)
        self.rewards = factories.make_rewards(self.config)
        self.prompts = factories.prompts_of(self.config)

    def points(
        self,
        policy: Policy,
        samples: int,
        cpu_seconds: float,
        *,
        guidance: Sequence[float] = (0.0,),
        is_conditioned: bool = True,
    ) -> Iterator[Point]:
        """What ``policy`` does under its best token, or without a token."""
        from quark.generation.transformers_generator import TransformersGenerator
        from quark.training.factories import make_evaluator

        peak = peak_mib()
        for strength in guidance:
            sampling = self.config.sampling.model_copy(update={"guidance": strength})
            config = self.config.model_copy(update={"sampling": sampling})
            evaluator = make_evaluator(
                config, self.prompts.evaluation, self.reference, self.rewards.reward, {}
            )
            generator: Generator = TransformersGenerator(
                policy, policy.tokenizer, policy.reward_tokens, sampling, self.device
            )
            if not is_conditioned:
                generator = Unconditioned(generator)
            with self.autocast():
                found = evaluator.evaluate(
                    generator, policy, quantile=policy.reward_tokens.num_quantiles - 1
                ).metrics
            yield Point(
                method=self.task.contender.method,
                settings=" ".join(self.task.contender.settings),
                seed=self.task.seed,
                samples=samples,
                guidance=strength,
                reward=found["reward_mean"],
                kl_per_completion=found["kl_sampled_per_completion"],
                kl_per_token=found["kl_sampled_to_reference"],
                distinct_2=found["distinct_2"],
                length=found["completion_length_mean"],
                perplexity=found["perplexity_reference"],
                cpu_seconds=cpu_seconds,
                peak_mib=peak,
            )

    def without_token(self, model: Any) -> Policy:  # noqa: ANN401 - a transformers model
        """A model that knows no reward token, as a policy."""
        from quark.models.policy import Policy

        class Plain(Policy):
            def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
                return self.causal.run(batch.reference_inputs())

        return Plain(model, self.policy.tokenizer, self.policy.reward_tokens)


class Unconditioned:
    """A generator that gives no token whatever it is asked for."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        quantile: int | None,  # noqa: ARG002 - that is the point
        seed: int,
    ) -> list[Completion]:
        return self._generator.generate(prompts, quantile=None, seed=seed)


def quark_points(task: Task, folder: Path) -> Iterator[Point]:
    """A whole run of quark, measured afterwards from its checkpoints."""
    from quark.config.load import load_config
    from quark.training.assemble import assemble
    from quark.training.events import Progress, RoundSummary, Silence
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


# Over all runs


def in_child(task: Task, trl: Path | None) -> list[Point]:
    """The points of a run in a fresh process.

    Raises:
        RuntimeError: it failed.
    """
    here = Path(__file__).resolve()
    paths = [str(here.parent.parent), os.environ.get("PYTHONPATH", ""), str(trl) if trl else ""]
    done = subprocess.run(
        [sys.executable, str(here), "--child", json.dumps(dataclasses.asdict(task))],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-8:]) or "killed")
    return [Point(**record) for record in json.loads(done.stdout.splitlines()[-1])]


def _swept(point: Point) -> str:
    """A peer's settings, or n: what tells its runs apart."""
    return "" if point.method.startswith(("quark", "X")) else f" [{point.settings}]"


def hull_height(points: Sequence[Point], drift: float, *, base: float) -> float:
    """The concave hull of ``points`` and the original model (0, ``base``) at ``drift``."""
    hull: list[tuple[float, float]] = [(0.0, base)]
    for x, y in sorted((max(0.0, p.kl_per_completion), p.reward) for p in points):
        if y <= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (x, y)) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((x, y))
    return float(np.interp(drift, *zip(*hull, strict=True)))


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / max(b[0] - a[0], 1e-12)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval (Student's t)."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    quantiles = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    t = quantiles.get(len(values), 1.96)
    return float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def compared(points: Sequence[Point]) -> list[int]:
    """The budgets at which something of quark's was measured; all where nothing was."""
    learned = [p for p in points if p.method != "best-of-n"]
    ours = [p for p in learned if p.method.startswith("quark")]
    return sorted({p.samples for p in ours or learned})


def tables(points: Sequence[Point], base: float) -> Iterator[str]:
    """Reward at equal drift, for every budget, as Markdown."""
    learned = [p for p in points if p.method != "best-of-n"]
    for budget in compared(points):
        yield f"\nReward at most so many nats per completion, {budget:,} scored samples\n"
        yield (
            "| method | "
            + " | ".join(f"{d:g}" for d in DRIFTS)
            + " | most | its nats | distinct-2 | CPU s |"
        )
        yield "| --- " * (len(DRIFTS) + 5) + "|"
        for method in dict.fromkeys(p.method for p in learned):
            row = _row(
                [p for p in learned if p.method == method and p.samples <= budget], budget, base
            )
            if row:
                yield f"| {method} | {row} |"
    fixed = [p for p in points if p.method == "best-of-n"]
    if fixed:
        heights = [hull_height(fixed, d, base=base) for d in DRIFTS]
        cells = " | ".join(f"{height:.3f}" for height in heights)
        yield f"\nbest-of-n (no training; n samples are scored for each answer): {cells}"


def _row(points: Sequence[Point], budget: int, base: float) -> str:
    """The cells of one method: at each drift the settings that are best in the mean over seeds."""
    if not any(p.samples == budget for p in points):
        return ""
    cells = []
    for drift in DRIFTS:
        best = max(
            (
                interval(
                    [
                        hull_height(
                            [p for p in points if p.settings == settings and p.seed == seed],
                            drift,
                            base=base,
                        )
                        for seed in sorted({p.seed for p in points if p.settings == settings})
                    ]
                )
                for settings in {p.settings for p in points}
            ),
            key=lambda pair: pair[0],
        )
        cells.append(f"{best[0]:.3f}" + ("" if math.isnan(best[1]) else f" ± {best[1]:.3f}"))
    last = [p for p in points if p.samples == budget and p.guidance == 0.0]
    by_settings = {
        settings: [p for p in last if p.settings == settings]
        for settings in {p.settings for p in last}
    }
    top = max(by_settings.values(), key=lambda some: float(np.mean([p.reward for p in some])))
    for name, form in (
        ("reward", ".3f"),
        ("kl_per_completion", ".1f"),
        ("distinct_2", ".2f"),
        ("cpu_seconds", ".0f"),
    ):
        cells.append(format(float(np.mean([getattr(p, name) for p in top])), form))
    return " | ".join(cells)


def draw(points: Sequence[Point], base: float, path: Path) -> None:
    """One panel for each budget: reward against drift, the mean hull over seeds of each method's best settings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    budgets = compared(points)
    figure, axes = plt.subplots(
        1, len(budgets), figsize=(3.4 * len(budgets), 3.6), sharey=True, squeeze=False
    )
    grid = np.linspace(0.0, 8.0, 65)
    for axis, budget in zip(axes[0], budgets, strict=True):
        for i, method in enumerate(dict.fromkeys(p.method for p in points)):
            own = [p for p in points if p.method == method]
            if method != "best-of-n":
                own = [p for p in own if p.samples <= budget]
                if not any(p.samples == budget for p in own):
                    continue
            end = max(p.kl_per_completion for p in own)
            curves = [
                np.mean(
                    [
                        [
                            hull_height(
                                [p for p in own if p.settings == s and p.seed == seed], d, base=base
                            )
                            for d in grid
                        ]
                        for seed in sorted({p.seed for p in own if p.settings == s})
                    ],
                    axis=0,
                )
                for s in ({p.settings for p in own} if method != "best-of-n" else {None})
                if s is not None
            ] or [np.array([hull_height(own, d, base=base) for d in grid])]
            height = np.max(curves, axis=0)
            shown = grid <= end
            style = "-" if method.startswith("quark") else "--"
            axis.plot(grid[shown], height[shown], style, color=f"C{i % 10}", label=method)
        axis.set_title(f"{budget:,} scored samples")
        axis.set_xlabel("nats per completion")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out reward")
    # Of all panels: a method may not have been measured at the largest budget.
    named = {
        text: h
        for axis in axes[0]
        for h, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    axes[0][-1].legend(named.values(), named.keys(), fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def contenders(arguments: argparse.Namespace) -> list[Contender]:
    """Who takes part."""
    has_trl = arguments.trl is not None or importlib.util.find_spec("trl") is not None
    found = [
        *(QUARK[:3] if arguments.quick else QUARK),
        *(() if arguments.quick else NEWEST_ROUND),
        RAFT,
    ]
    found.append(Contender(method="best-of-n", kind="best-of-n"))
    if has_trl:
        found += peers(is_swept=not arguments.quick)
    else:
        print("TRL is not installed: without GRPO and RLOO (--trl)", file=sys.stderr)
    for text in arguments.contender or ():
        name, _, settings = text.partition(":")
        found.append(Contender(method=name.strip(), settings=tuple(settings.split())))
    if arguments.only:
        found = [c for c in found if any(c.method.startswith(name) for name in arguments.only)]
    return found


def main() -> int:
    """Run all contenders, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", type=Path, help="folder that TRL was installed in")
    parser.add_argument("--quick", action="store_true", help="one seed, 512 samples, no sweep")
    parser.add_argument("--tune", action="store_true", help="measure on training prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--budgets", type=int, nargs="+", default=None)
    parser.add_argument(
        "--base", metavar="'KEY=VALUE ...'", help="quark settings of all: another task"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=list(GUIDANCE))
    parser.add_argument("--only", nargs="+", help="methods whose names contain one of these")
    parser.add_argument("--contender", action="append", metavar="NAME: KEY=VALUE ...")
    parser.add_argument("--json", type=Path, help="where the points go, as a list")
    parser.add_argument("--from-json", type=Path, nargs="+", help="points that are there already")
    parser.add_argument("--picture", type=Path, help="where the picture goes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        points = child(Task.parse(arguments.child))
        print(json.dumps([dataclasses.asdict(point) for point in points]))
        return 0
    seeds = arguments.seeds or ([0] if arguments.quick else [0, 1, 2, 3, 4])
    budgets = arguments.budgets or [b for b in BUDGETS if not arguments.quick or b <= 512]
    points: list[Point] = []
    for file in arguments.from_json or ():
        points += [Point(**record) for record in json.loads(file.read_text())]
    failed = 0
    if not arguments.from_json:
        tasks = [
            Task(
                contender=contender,
                seed=seed,
                budgets=tuple(together),
                guidance=tuple(arguments.guidance),
                base=tuple((arguments.base or "").split()),
                is_tuning=arguments.tune,
            )
            for contender in contenders(arguments)
            for seed in seeds
            for together in ([[b] for b in budgets] if contender.is_annealed else [budgets])
        ]

        def run(task: Task) -> list[Point]:
            try:
                found = in_child(task, arguments.trl)
            except RuntimeError as error:
                print(f"{task.contender.method}, seed {task.seed}: {error}", file=sys.stderr)
                return []
            for point in found:
                print(
                    f"{point.method}{_swept(point)}, seed {point.seed}: {point.samples:>5} samples, guidance {point.guidance:<4} reward {point.reward:.3f} at {point.kl_per_completion:5.2f} nats, "
                    f"distinct-2 {point.distinct_2:.2f}, length {point.length:.1f}, {point.cpu_seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            return found

        with ThreadPoolExecutor(arguments.jobs) as pool:
            for found in pool.map(run, tasks):
                failed += not found
                points += found
                if arguments.json:
                    records = [dataclasses.asdict(point) for point in points]
                    arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    originals = [p.reward for p in points if p.method == "best-of-n" and p.samples == 1]
    base = float(np.mean(originals)) if originals else 0.45
    print("\n".join(tables(points, base)))
    if arguments.picture:
        draw(points, base, arguments.picture)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
