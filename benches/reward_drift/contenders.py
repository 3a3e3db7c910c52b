"""The methods that are compared, with their settings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

BUDGETS = (256, 512, 1024, 2048, 4096)
DRIFTS = (2.0, 3.0, 3.5, 4.0, 5.0, 6.0)
"""Nats per completion at which rewards are compared."""
GUIDANCE = (0.0, 0.1, 0.25, 0.5, 1.0)
QUICK_GUIDANCE = (0.0, 0.5, 1.0)
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
TILT = (
    "objective.lm_coef=0",
    "objective.contrast_coef=0",
    "objective.kl_coef=0",
    "objective.tilt_coef=1",
    "sampling.guide=critic",
)
CRITIC = (
    "model.reward_tokens=false",
    "objective.lm_coef=0",
    "objective.contrast_coef=0",
    "run.steps_per_round=1",
    "sampling.guide=critic",
    "sampling.guidance=3",
)
"""Nothing is trained: only the critic learns."""
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
    def guidance_scale(self) -> float:
        """What strengths of guidance are multiplied by: a critic's are larger than those of tokens."""
        return 4.0 if "sampling.guide=critic" in self.settings else 1.0

    @property
    def is_annealed(self) -> bool:
        """Whether the learning rate falls to 0 at the last sample, so that every budget takes a run of its own."""
        names = ("schedule=linear", "optimizer.schedule=linear", "optimizer.schedule=cosine")
        return any(name in self.settings for name in names)


QUARK = (
    Contender(method="quark contrast", settings=CONTRAST),
    Contender(method="quark likelihood", settings=LIKELIHOOD),
    Contender(method="quark advantage", settings=(*ADVANTAGE, *NEWEST)),
    Contender(method="quark critic alone", settings=CRITIC),
    Contender(method="quark tilt", settings=TILT),
    Contender(
        method="quark contrast, by the critic", settings=(*CONTRAST, "sampling.guide=critic")
    ),
    Contender(
        method="quark contrast + advantage",
        settings=(*CONTRAST, "objective.advantage_coef=0.05", "objective.advantage_scope=round"),
    ),
    Contender(
        method="quark likelihood + contrast",
        settings=(*CONTRAST, "objective.lm_coef=0.1"),
    ),
)
QUICK = ("quark contrast", "quark likelihood", "quark critic alone")
NEWEST_ROUND = (
    Contender(method="quark critic alone, newest round", settings=(*CRITIC, *NEWEST)),
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
