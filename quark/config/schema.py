"""The whole configuration: every room's section, composed.

A knob is declared in the room that obeys it; only what belongs to the loop itself is declared here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from quark.data.prompts import PromptConfig
from quark.evaluation.evaluator import EvaluationConfig
from quark.generation.base import SamplingConfig
from quark.models.loading import ModelConfig
from quark.objectives.quark import LMSoftmax, QuarkObjectiveConfig
from quark.pool.base import (
    MAX_AGE_HALF_LIFE,
    RemainderRule,
    SamplingMode,
    TieRule,
)
from quark.pool.columns import REWARD_COLUMN
from quark.pool.defaults import MAX_QUANTILES, NUM_QUANTILES
from quark.pool.ranking import RankingRules
from quark.reference.config import ReferenceConfig
from quark.rewards.config import RewardConfig, RewardName
from quark.settings import Settings

_DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]


class RunSection(Settings):
    """The length and shape of the run."""

    seed: int = Field(0, ge=0)
    """Everything random is derived from it."""
    num_rounds: int = Field(10, ge=1)
    """Rounds of learning; each is preceded by an exploration."""
    steps_per_round: int = Field(16, ge=1)
    """Optimizer steps between two explorations (the paper's M)."""
    brake_every_steps: int | None = Field(None, ge=1)
    """Measure the held-out part of the pool (``pool.held_out_share``) before a round's first step and after every so many,
    and end the round's steps once its contrast has been above the round's lowest twice in a row. Unset takes all steps."""
    prompts_first_round: int = Field(2048, ge=1)
    """Prompts explored with the original model before anything is learnt; prompts repeat if there are fewer."""
    prompts_per_round: int = Field(512, ge=1)
    """Prompts explored under the best token before each later round."""
    completions_per_prompt: int = Field(1, ge=1)
    """Completions sampled of each."""
    chunk_size: int = Field(512, ge=1)
    """Completions that are sampled, scored and committed together; what an interruption can cost."""
    overlap_scoring: bool | None = None
    """Ask the rewards of a chunk in a thread while the next chunk is generated. Pool and scores stay the same (up to rounding
    where a torch model on the CPU scores beside ``sampling.backend = "http"``). Unset:
    where the reward does not compute in the run's own thread anyway (``http``, or a function with
    ``reward.timeout_s``) and no function of yours is among ``pool.extra_scores``."""
    device: str = "auto"
    """``auto`` (CUDA, else MPS, else CPU) or a torch device."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast: ``auto`` is bfloat16 on CUDA devices that have it, else float32."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads; unset leaves torch's choice."""
    parallel: Literal["data", "sharded"] | None = None
    """With several processes: ``data`` has each hold the whole model, ``sharded`` (FSDP2) a part of its weights, gradients
    and moments; see docs/distributed.md. Unset: ``sharded`` where accelerate's configuration asks for FSDP, else ``data``.
    May be another one in each start of a run."""
    peer_timeout_s: float = Field(1800.0, gt=0.0)
    """With several processes: how long one may keep the others waiting before they give up, in seconds. The scoring
    of a chunk and the saving of a checkpoint have to fit in."""


class PoolSection(Settings):
    """The sample pool and how it is cut and drawn from."""

    num_quantiles: int = Field(NUM_QUANTILES, ge=1, le=MAX_QUANTILES)
    """K, also the number of reward tokens."""
    ties: TieRule = TieRule.HASH
    """How equal rewards are cut at a boundary."""
    remainder: RemainderRule = RemainderRule.SPREAD
    """Which quantiles get the samples that do not divide."""
    sampling: SamplingMode = SamplingMode.STRATIFIED
    """How minibatches are drawn."""
    train_quantiles: Literal["all", "best"] = "all"
    """``best`` trains on the best quantile alone, for comparison: it loses diversity and the contrast."""
    last_rounds: int | None = Field(None, ge=1)
    """Rank and train on samples of the newest so many rounds alone; unset takes the whole pool."""
    where: str | None = None
    """Rank and train on samples for which this SQL expression holds, over score columns and ``round``, ``chunk``,
    ``policy_step``, ``reward_token``, ``finish_reason``, ``logprob_policy``, ``logprob_reference``, ``logprob_sampled``,
    ``prompt_id``."""
    min_score: float | None = None
    """Rank and train on samples alone whose reward is at least this. With ``num_quantiles = 1`` that is RAFT (Dong et
    al. 2023) or ReST (Gulcehre et al. 2023): likelihood training on what passes a threshold."""
    max_per_round: int | None = Field(None, ge=1)
    """Rank and train on at most so many samples of each round, chosen by a hash of their numbers among those that
    fulfil everything else."""
    age_half_life: float | None = Field(None, gt=0.0, le=MAX_AGE_HALF_LIFE)
    """Rounds after which a sample is drawn half as often as one of the newest round; quantiles stay exact. Needs
    ``sampling = "stratified"``."""
    max_uses: int | None = Field(None, ge=1)
    """How often a round of learning draws a sample at most. Quantiles that are used up leave their places to the
    others; the run stops where nothing is left for a step. Not with ``sampling = "iid"``."""
    bucket_window: int = Field(1, ge=1, le=4096)
    """Deal the samples of so many batches in a row among them by length, quantile by quantile: less padding, the same
    samples. 1 leaves batches as they are drawn."""
    held_out_share: float = Field(0.0, ge=0.0, lt=0.5)
    """Share of the training prompts whose samples are ranked with the others and never trained on, chosen by a hash.
    On them each round measures what the reward tokens say of samples that were not learned from."""
    per_prompt: bool = False
    """Cut the samples of each prompt for themselves (ALT, Abadal et al. 2024), so that a quantile says how good a
    completion is for its prompt; explore with several completions per prompt then."""
    extra_scores: tuple[RewardName, ...] = ()
    """Further rewards by name, e.g. ``["vader"]``: scored and stored beside the reward, never trained on."""
    store_text: bool = True
    """Keep the completions' text beside their tokens."""

    def ranking(self, score: str = REWARD_COLUMN) -> RankingRules:
        """How the pool is cut into quantiles by one score column."""
        return RankingRules(
            num_quantiles=self.num_quantiles,
            score=score,
            ties=self.ties,
            remainder=self.remainder,
            last_rounds=self.last_rounds,
            where=self.where,
            min_score=self.min_score,
            max_per_round=self.max_per_round,
            per_prompt=self.per_prompt,
        )


class OptimizerSection(Settings):
    """AdamW and its schedule."""

    batch_size: int = Field(128, ge=1, lt=1 << 32)
    """Samples per optimizer step."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per forward and backward pass; unset takes the whole batch. Does not change the loss. Where memory
    runs out it is halved, and the step is run again."""
    learning_rate: float = Field(1e-5, gt=0.0)
    """Peak learning rate."""
    reward_token_lr_scale: float = Field(1.0, gt=0.0)
    """The reward tokens' vectors learn this many times faster than the rest. They begin as noise: where there are
    few steps at a small learning rate, they need more than the weights that are pre-trained."""
    settling_steps: int = Field(0, ge=0)
    """Steps before the first round's own, without labels: the reward tokens' vectors are shifted, all alike, to where they
    cost least, so that a token by itself does not move the model away from the original. A pre-trained model needs it."""
    settling_rate: float = Field(0.15, gt=0.0)
    """Learning rate of these steps, in root mean squares of the vocabulary's vectors; falls to 0."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up, down to 0 at the run's last step."""
    betas: tuple[_DecayRate, _DecayRate] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: float = Field(1e-8, gt=0.0)
    """Adam's epsilon."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay of matrices: linear layers, an untied vocabulary head, adapters. Biases, norms and embeddings
    (with a head that is tied to them, and the reward tokens' vectors) are not decayed."""
    implementation: Literal["auto", "fused", "foreach"] = "auto"
    """Of AdamW: ``fused`` is one kernel, ``foreach`` one operation after the other over all weights at once, which takes
    more memory and works on any device. ``auto`` is fused where the device has it. They differ by rounding."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """Clip the gradient's norm; 0 does not clip."""
    max_skipped_steps: int = Field(5, ge=0)
    """Steps in a row whose loss or gradient is not finite before the run stops with status 3; each is skipped
    and counted."""


class CheckpointSection(Settings):
    """What survives an interruption."""

    every_rounds: int = Field(1, ge=1)
    """A checkpoint after this many rounds, and whenever the run is asked to stop."""
    keep_last: int = Field(2, ge=2)
    """Older checkpoints are removed, never below two."""
    keep_best: int = Field(0, ge=0)
    """As many checkpoints with the highest reward on held-out prompts are kept besides."""


class AlertsSection(Settings):
    """When a run that goes on deserves a warning."""

    stop: bool = False
    """Write a checkpoint and end the run at the first alert of a round; otherwise alerts only warn."""
    kl_above: float = Field(2.0, ge=0.0)
    """KL(sampled || original) in nats per token: under the best token on held-out prompts, or KL(policy || original)
    over the round's steps where there was no evaluation. 0 never warns, also below."""
    failed_share_above: float = Field(0.05, ge=0.0, le=1.0)
    """Share of a round's new samples that got no score; 1 never warns."""
    distinct_2_below: float = Field(0.5, ge=0.0, le=1.0)
    """Distinct-2 of the held-out completions, as a share of the original model's."""
    control_gap_below: float = Field(0.1, ge=0.0, lt=1.0)
    """Reward under the best token minus that under the lowest, as a share of the largest it has been."""
    flat_evaluations: int = Field(4, ge=0)
    """Evaluations after which that difference should have been clearly above zero once, and rounds after which the
    information should have been."""
    information_below: float = Field(0.1, ge=0.0, lt=1.0)
    """What the reward tokens say of samples that were not learned from, held out or new, as a share of the most that
    they have said."""


class TrackingSection(Settings):
    """Where figures go besides ``metrics.jsonl``."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Extras; each needs its package."""
    project: str = "quark"
    """Project name for W&B and trackio."""
    samples_per_round: int = Field(3, ge=0)
    """Samples of the best and worst quantile shown after each round."""


class RunConfig(Settings):
    """Everything a run can be told."""

    run: RunSection = RunSection()
    model: ModelConfig = ModelConfig()
    prompts: PromptConfig = PromptConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    pool: PoolSection = PoolSection()
    reference: ReferenceConfig = ReferenceConfig()
    objective: QuarkObjectiveConfig = QuarkObjectiveConfig()
    optimizer: OptimizerSection = OptimizerSection()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointSection = CheckpointSection()
    alerts: AlertsSection = AlertsSection()
    tracking: TrackingSection = TrackingSection()

    @property
    def overlaps_scoring(self) -> bool:
        """Whether rewards are asked while the next chunk is generated.

        By itself only where that cannot matter to the reward: a function may care in which thread it
        runs (an SQLite connection does), and the built-in scorers have the same cores to share.
        """
        if self.run.overlap_scoring is not None:
            return self.run.overlap_scoring
        is_apart = self.reward.name == "http" or (
            ":" in self.reward.name and self.reward.timeout_s is not None
        )
        return is_apart and not any(":" in name for name in self.pool.extra_scores)

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        micro = self.optimizer.micro_batch_size
        if micro is not None and micro > self.optimizer.batch_size:
            raise ValueError(
                f"optimizer.micro_batch_size ({micro}) is larger than optimizer.batch_size "
                f"({self.optimizer.batch_size})"
            )
        if self.model.lora.rank and self.objective.lm_softmax is LMSoftmax.ENLARGED:
            raise ValueError(
                'objective.lm_softmax = "enlarged" trains the vocabulary head\'s columns of the reward tokens, '
                'which stay as they are with model.lora.rank: leave it at "base"'
            )
        if self.objective.contrast_coef and self.pool.num_quantiles == 1:
            raise ValueError(
                "objective.contrast_coef compares reward tokens, and pool.num_quantiles = 1 leaves one: "
                "give more quantiles, or set it to 0"
            )
        if self.run.brake_every_steps is not None and not self.pool.held_out_share:
            raise ValueError(
                "run.brake_every_steps measures the held-out part of the pool, and pool.held_out_share = 0 leaves "
                "none: set it to 0.2, say"
            )
        if self.pool.per_prompt and self.pool.remainder is not RemainderRule.SPREAD:
            raise ValueError("pool.remainder has no meaning with pool.per_prompt: leave it out")
        if (
            self.pool.age_half_life is not None
            and self.pool.sampling is not SamplingMode.STRATIFIED
        ):
            raise ValueError(
                f'pool.age_half_life needs pool.sampling = "stratified", not "{self.pool.sampling}"'
            )
        if self.pool.max_uses is not None and self.pool.sampling is SamplingMode.IID:
            raise ValueError(
                'pool.max_uses cannot be kept with pool.sampling = "iid", which draws with replacement'
            )
        if self.sampling.min_new_tokens > self.sampling.max_new_tokens:
            raise ValueError("sampling.min_new_tokens is larger than sampling.max_new_tokens")
        return self
