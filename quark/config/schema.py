"""The whole configuration: composed of the sections of all modules.

Each family declares its own section, in a module that imports no torch. This module declares the
sections of the loop itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from quark.data.prompts import PromptConfig
from quark.evaluation.config import EvaluationConfig
from quark.generation.base import SamplingConfig
from quark.models.config import ModelConfig
from quark.objectives.config import LMSoftmax, QuarkObjectiveConfig
from quark.pool.base import (
    MAX_AGE_HALF_LIFE,
    RemainderRule,
    SamplingMode,
    TieRule,
)
from quark.pool.columns import GOLD_COLUMN, REWARD_COLUMN, column_name, member_column
from quark.pool.combiners import CombinerConfig, Ensemble
from quark.pool.defaults import MAX_QUANTILES, NUM_QUANTILES
from quark.pool.ranking import RankingRules
from quark.reference.config import ReferenceConfig
from quark.rewards.config import RewardConfig, RewardName
from quark.settings import Settings

_DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
DEFAULT_INIT_WEIGHT = 0.3
"""Default weight of the original model in the average at a reset."""


class RunSection(Settings):
    """The length and shape of the run."""

    seed: int = Field(0, ge=0)
    """All randomness is derived from it."""
    num_rounds: int = Field(10, ge=1)
    """Rounds of learning, each preceded by an exploration."""
    steps_per_round: int = Field(16, ge=1)
    """Optimizer steps between two explorations (the paper's M)."""
    brake_every_steps: int | None = Field(None, ge=1)
    """Measure the held-out part of the pool (``pool.held_out_share``) before a round's first step
    and after every this many steps. End the round once the contrast has been above the round's
    lowest twice in a row. Unset takes all steps."""
    prompts_first_round: int = Field(2048, ge=1)
    """Prompts explored with the original model before the first step; prompts repeat if there are
    fewer."""
    prompts_per_round: int = Field(512, ge=1)
    """Prompts explored from the best quantile before each later round."""
    completions_per_prompt: int = Field(1, ge=1)
    """Completions sampled for each prompt."""
    chunk_size: int = Field(512, ge=1)
    """Completions that are sampled, scored and committed together; an interruption loses at most
    this many."""
    overlap_scoring: bool | None = None
    """Score a chunk in a thread while the next chunk is generated. Pool and scores stay the same
    (up to rounding if a torch model on the CPU scores beside ``sampling.backend = "http"``). Unset:
    on if the reward does not compute in the run's own thread anyway (``http``, or a function with
    ``reward.timeout_s``) and ``pool.extra_scores`` contains no function of yours."""
    device: str = "auto"
    """``auto`` (CUDA, else MPS, else CPU) or a torch device."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast: ``auto`` is bfloat16 on CUDA devices that have it, else float32."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads; unset leaves torch's choice."""
    parallel: Literal["data", "sharded"] | None = None
    """With several processes: with ``data``, each holds the whole model; with ``sharded`` (FSDP2),
    a part of its weights, gradients and moments. See docs/distributed.md. Unset: ``sharded`` if
    accelerate's configuration asks for FSDP, else ``data``. May change when a run is resumed."""
    peer_timeout_s: float = Field(1800.0, gt=0.0)
    """With several processes: how long one may keep the others waiting before they give up, in
    seconds. Must cover the scoring of a chunk and the saving of a checkpoint."""


class PoolSection(Settings):
    """The sample pool, its quantiles and its minibatches."""

    num_quantiles: int = Field(NUM_QUANTILES, ge=1, le=MAX_QUANTILES)
    """K, also the number of reward tokens."""
    ties: TieRule = TieRule.HASH
    """How equal rewards are split at a boundary."""
    remainder: RemainderRule = RemainderRule.SPREAD
    """Which quantiles get the samples that do not divide evenly."""
    sampling: SamplingMode = SamplingMode.STRATIFIED
    """How minibatches are drawn."""
    train_quantiles: Literal["all", "best"] = "all"
    """``best`` trains on the best quantile only, for comparison. It loses diversity and the
    contrast."""
    last_rounds: int | None = Field(None, ge=1)
    """Rank and train only on samples of this many newest rounds; unset takes the whole pool."""
    where: str | None = None
    """Rank and train only on samples for which this SQL expression holds, over score columns and
    ``round``, ``chunk``, ``policy_step``, ``reward_token``, ``finish_reason``, ``logprob_policy``,
    ``logprob_reference``, ``logprob_sampled``, ``prompt_id``."""
    min_score: float | None = None
    """Rank and train only on samples whose reward is at least this. With ``num_quantiles = 1`` this
    is RAFT (Dong et al. 2023) or ReST (Gulcehre et al. 2023): likelihood training on samples above
    a threshold."""
    max_per_round: int | None = Field(None, ge=1)
    """Rank and train on at most this many samples of each round, chosen by a hash of their ids
    among those that satisfy all other conditions."""
    age_half_life: float | None = Field(None, gt=0.0, le=MAX_AGE_HALF_LIFE)
    """Number of rounds after which a sample is drawn half as often as one of the newest round.
    Quantiles stay exact. Needs ``sampling = "stratified"``."""
    max_uses: int | None = Field(None, ge=1)
    """Maximum number of times that a round of learning draws a sample. Exhausted quantiles leave
    their places to the others, and the run stops if nothing is left for a step. Not with
    ``sampling = "iid"``."""
    bucket_window: int = Field(1, ge=1, le=4096)
    """Bucket samples by length across this many consecutive batches, quantile by quantile: less
    padding, the same samples. 1 turns it off."""
    held_out_share: float = Field(0.0, ge=0.0, lt=0.5)
    """Share of the training prompts whose samples are ranked with the others and never trained on,
    chosen by a hash. Each round uses them to measure the information of the reward tokens on
    samples that it has not trained on."""
    per_prompt: bool = False
    """Rank the samples of each prompt separately (ALT, Abadal et al. 2024), so that a quantile says
    how good a completion is for its prompt. Explore with several completions per prompt."""
    extra_scores: tuple[RewardName, ...] = ()
    """Further rewards by name, e.g. ``["vader"]``: scored and stored with the reward, never trained
    on."""
    gold: RewardName | None = None
    """A reward that stands for the truth: scored and stored as the column ``gold``, measured at every
    evaluation, never ranked or trained on."""
    store_text: bool = True
    """Store the text of completions with their tokens."""

    def ranking(
        self, score: str = REWARD_COLUMN, *, ensemble: Ensemble | None = None
    ) -> RankingRules:
        """How the pool is cut into quantiles by one score column, or by a combination instead."""
        return RankingRules(
            num_quantiles=self.num_quantiles,
            score=score,
            ensemble=ensemble,
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
    """Samples per forward and backward pass; unset takes the whole batch. Does not change the loss.
    If memory runs out, it is halved and the step is run again."""
    learning_rate: float = Field(1e-5, gt=0.0)
    """Peak learning rate."""
    reward_token_lr_scale: float = Field(1.0, gt=0.0)
    """The vectors of the reward tokens learn this many times faster than the rest. They start as
    noise, so a short run at a small learning rate needs a larger rate for them than for the
    pre-trained weights."""
    settling_steps: int = Field(0, ge=0)
    """Steps before the first round's own, without labels. They shift the vectors of all reward
    tokens by the same amount to where they cost least, so that a token by itself does not move the
    model away from the original. A pre-trained model needs it."""
    settling_rate: float = Field(0.15, gt=0.0)
    """Learning rate of these steps, in root mean squares of the vocabulary's vectors; falls to 0."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule after the warm-up, down to 0 at the run's last step."""
    betas: tuple[_DecayRate, _DecayRate] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: float = Field(1e-8, gt=0.0)
    """Adam's epsilon."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay for matrices: linear layers, an untied vocabulary head, adapters.
    Biases, norms and embeddings (with a head that is tied to them, and the reward tokens' vectors)
    are not decayed."""
    implementation: Literal["auto", "fused", "foreach"] = "auto"
    """AdamW implementation: ``fused`` is a single kernel; ``foreach`` runs one operation after the
    other over all weights at once, takes more memory and works on any device. ``auto`` is fused if
    the device supports it. They differ by rounding."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """Clip the gradient's norm; 0 does not clip."""
    max_skipped_steps: int = Field(5, ge=0)
    """Number of consecutive steps with a non-finite loss or gradient before the run stops with
    status 3; each is skipped and counted."""


class AverageSection(Settings):
    """A moving average of the trained weights: for Elastic Reset, for sampling, or as the reference."""

    reset_every_rounds: int | None = Field(None, ge=1)
    """Elastic Reset (Noukhovitch et al. 2023): before every exploration whose round is a multiple of
    this, the policy goes back to the average, and the average to the original model. Unset never
    resets. The vectors of the reward tokens are kept."""
    init_weight_at_reset: float | None = Field(None, ge=0.0, le=1.0)
    """Weight of the original model in the average when a reset is due: 0 does not change the
    policy, 1 goes all the way back. Gives the decay. Unset: 0.3, unless ``decay`` is set."""
    decay: float | None = Field(None, ge=0.0, le=1.0)
    """Share of the average that an update keeps; the rest comes from the policy."""
    update_every_steps: int = Field(1, ge=1)
    """Update the average after every so many optimizer steps."""
    kl_anchor: Literal["initial", "ema"] = "initial"
    """What the KL penalty of the training steps compares with: the original model, or the average.
    With ``decay = 0.4`` and ``update_every_steps = 512``, ``ema`` is TR-DPO's soft update. Evaluations
    always measure the drift from the original model."""
    samples: Literal["policy", "ema"] = "policy"
    """Weights that explore, are evaluated and are published at the end; training steps always change
    the policy's own."""

    @property
    def is_used(self) -> bool:
        """Whether a run keeps an average."""
        return (
            self.reset_every_rounds is not None
            or self.kl_anchor != "initial"
            or self.samples != "policy"
        )

    def updates_per_reset(self, steps_per_round: int) -> float:
        """Updates of the average between two resets, if no round is cut short."""
        return (self.reset_every_rounds or 0) * steps_per_round / self.update_every_steps

    def decay_in(self, steps_per_round: int) -> float:
        """The decay, as given or from the weight at a reset."""
        if self.decay is not None:
            return self.decay
        weight = (
            DEFAULT_INIT_WEIGHT if self.init_weight_at_reset is None else self.init_weight_at_reset
        )
        return float(weight ** (1.0 / self.updates_per_reset(steps_per_round)))

    @model_validator(mode="after")
    def _is_complete(self) -> AverageSection:
        if self.decay is not None and self.init_weight_at_reset is not None:
            raise ValueError(
                "average.decay and average.init_weight_at_reset both say how fast the average moves: set one of them"
            )
        if self.init_weight_at_reset is not None and self.reset_every_rounds is None:
            raise ValueError(
                "average.init_weight_at_reset is the weight at a reset, and average.reset_every_rounds is unset: "
                "set it, or give average.decay"
            )
        if self.is_used and self.reset_every_rounds is None and self.decay is None:
            raise ValueError("average.decay is unset: set it, to 0.99 say")
        if self.decay is not None and not self.is_used:
            raise ValueError(
                'average.decay has no use: set average.reset_every_rounds, average.samples = "ema" or '
                'average.kl_anchor = "ema"'
            )
        if self.reset_every_rounds is not None and self.samples == "ema":
            raise ValueError(
                'average.samples = "ema" with average.reset_every_rounds would explore with the original model after '
                'each reset: set samples = "policy", or leave the resets out'
            )
        return self


class CheckpointSection(Settings):
    """The state that survives an interruption."""

    every_rounds: int = Field(1, ge=1)
    """Write a checkpoint after this many rounds, and whenever the run is asked to stop."""
    keep_last: int = Field(2, ge=2)
    """Number of newest checkpoints to keep, at least two."""
    keep_best: int = Field(0, ge=0)
    """Number of further checkpoints to keep: those with the highest reward on held-out prompts."""


class AlertsSection(Settings):
    """When to warn about a running run."""

    stop: bool = False
    """Write a checkpoint and end the run at the first alert of a round; otherwise alerts only warn."""
    kl_above: float = Field(2.0, ge=0.0)
    """KL(sampled || original) in nats per token: of the best quantile on held-out prompts, or
    KL(policy || original) over the round's steps if there was no evaluation. 0 turns this alert
    off, and also those of the ``..._below`` keys."""
    failed_share_above: float = Field(0.05, ge=0.0, le=1.0)
    """Share of a round's new samples that got no score; 1 never warns."""
    distinct_2_below: float = Field(0.5, ge=0.0, le=1.0)
    """Distinct-2 of the held-out completions, as a share of the original model's."""
    control_gap_below: float = Field(0.1, ge=0.0, lt=1.0)
    """Reward of the best quantile minus that of the lowest, as a share of its largest value so
    far."""
    flat_evaluations: int = Field(4, ge=0)
    """Number of evaluations by which that difference should have been clearly above zero once, and
    of rounds by which the information should have been."""
    information_below: float = Field(0.1, ge=0.0, lt=1.0)
    """Information of the reward tokens on samples that the run has not trained on, held out or new,
    as a share of its largest value so far."""


class TrackingSection(Settings):
    """Where figures are sent, in addition to ``metrics.jsonl``."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Each needs its own package."""
    project: str = "quark"
    """Project name for W&B and trackio."""
    samples_per_round: int = Field(3, ge=0)
    """Samples of the best and worst quantile shown after each round."""


class RunConfig(Settings):
    """All settings of a run."""

    run: RunSection = RunSection()
    model: ModelConfig = ModelConfig()
    prompts: PromptConfig = PromptConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    combiner: CombinerConfig = CombinerConfig()
    pool: PoolSection = PoolSection()
    reference: ReferenceConfig = ReferenceConfig()
    objective: QuarkObjectiveConfig = QuarkObjectiveConfig()
    optimizer: OptimizerSection = OptimizerSection()
    average: AverageSection = AverageSection()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointSection = CheckpointSection()
    alerts: AlertsSection = AlertsSection()
    tracking: TrackingSection = TrackingSection()

    @property
    def further_columns(self) -> dict[str, str]:
        """The score columns beside the reward's, and the reward that fills each."""
        members = {member_column(i + 1): name for i, name in enumerate(self.reward.members)}
        extra = {column_name(name): name for name in self.pool.extra_scores}
        gold = {} if self.pool.gold is None else {GOLD_COLUMN: self.pool.gold}
        return members | extra | gold

    @property
    def needs_critic(self) -> bool:
        """Whether every round fits a token critic to the pool: for the loss, or as a guide."""
        return self.objective.tilt_coef > 0.0 or self.sampling.guide == "critic"

    @property
    def trains_weights(self) -> bool:
        """Whether optimizer steps can change anything. Without reward tokens, a policy that only a KL holds stays put."""
        objective = self.objective
        return bool(
            objective.learns_rewards
            or objective.unlikelihood_coef
            or objective.entropy_coef
            or (objective.kl_coef and self.model.reward_tokens)
        )

    @property
    def overlaps_scoring(self) -> bool:
        """Whether a chunk is scored while the next one is generated.

        The default turns it on only if that cannot affect the reward: a function may care in which
        thread it runs (an SQLite connection does), and the built-in scorers have the same cores to
        share.
        """
        if self.run.overlap_scoring is not None:
            return self.run.overlap_scoring
        is_apart = self.reward.name == "http" or (
            ":" in self.reward.name and self.reward.timeout_s is not None
        )
        return is_apart and not any(":" in name for name in self.further_columns.values())

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
                'which model.lora.rank keeps fixed: leave it at "base"'
            )
        if self.objective.contrast_coef and self.pool.num_quantiles == 1:
            raise ValueError(
                "objective.contrast_coef compares reward tokens, and pool.num_quantiles = 1 leaves one: "
                "give more quantiles, or set it to 0"
            )
        if not self.objective.learns_rewards and self.sampling.guide != "critic":
            raise ValueError(
                "objective.lm_coef, contrast_coef, advantage_coef and tilt_coef are all 0: nothing would be learned. Give "
                'one of them a value, or sample along the critic with sampling.guide = "critic"'
            )
        if not self.model.reward_tokens:
            self._does_without_tokens()
        if self.average.is_used and not self.trains_weights:
            raise ValueError(
                "average.* averages trained weights, and no term of the objective trains any: leave it out"
            )
        if self.run.brake_every_steps is not None and not self.pool.held_out_share:
            raise ValueError(
                "run.brake_every_steps measures the held-out part of the pool, and pool.held_out_share = 0 leaves "
                "none: set it to 0.2, say"
            )
        if self.average.kl_anchor == "ema" and self.reference.cache != "off":
            raise ValueError(
                'reference.cache keeps what the original model computes, and average.kl_anchor = "ema" does not '
                'use it: set reference.cache = "off"'
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

    def _does_without_tokens(self) -> None:
        """Refuse what needs the reward tokens that ``model.reward_tokens = false`` leaves out."""
        if self.sampling.guide != "critic":
            raise ValueError(
                'model.reward_tokens is off, so only the critic tells quantiles apart: set sampling.guide = "critic"'
            )
        needing = {
            "objective.lm_coef": self.objective.lm_coef,
            "objective.contrast_coef": self.objective.contrast_coef,
            "optimizer.settling_steps": self.optimizer.settling_steps,
            "pool.held_out_share": self.pool.held_out_share,
        }
        for key, value in needing.items():
            if value:
                raise ValueError(
                    f"{key} trains or measures reward tokens, and model.reward_tokens is off: set it to 0"
                )
        if self.objective.tilt_coef and self.objective.tilt_best_share < 1.0:
            raise ValueError(
                "objective.tilt_best_share below 1 gives the other tokens tilts of their own, and model.reward_tokens is "
                "off: set it to 1"
            )
