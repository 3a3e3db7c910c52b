"""Training steps that are compared: ours, the published code's arithmetic, and plain fine-tuning.

Models have random weights, in the shapes of known ones; batches hold random tokens, all of one length.
The published step is written here from a description of what it computes (no code of it is used): the
logits of prompt and completion from both models, with the caches of generation kept; log-probabilities
and entropy over the enlarged vocabulary; the divergence twice with its graph, once for the loss and once for
the log.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from quark.models.activations import fuse_activations
from quark.models.batch import TrainingBatch, valid_positions
from quark.models.causal import CausalModel, CompletionRows
from quark.models.policy import Policy
from quark.models.positions import give_reward_token_its_own_position
from quark.models.recomputation import recompute_layers
from quark.models.reward_tokens import RewardTokens
from quark.objectives.config import KLDirection, LMSoftmax, QuarkObjectiveConfig, Reduction
from quark.objectives.quark import QuarkObjective
from quark.reference.base import FrozenReference, ReferencePolicy

STEPS = ("ours", "cached", "recomputed", "paper", "published", "fine_tuning")
NUM_QUANTILES = 5
KL_COEF, ENTROPY_COEF = 0.05, 0.06
"""The published code's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's dimensions."""

    name: str
    family: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    inner: int = 0
    key_heads: int = 0
    positions: int = 1024

    def with_vocabulary(self, size: int) -> Shape:
        return Shape(**{f: getattr(self, f) for f in self.__slots__} | {"vocabulary": size})


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="tiny", family="gpt2", layers=2, width=32, heads=2, vocabulary=500),
        Shape(name="gpt2-small", family="gpt2", layers=12, width=768, heads=12, vocabulary=50_257),
        Shape(name="gpt2-large", family="gpt2", layers=36, width=1280, heads=20, vocabulary=50_257),
        Shape(
            name="smollm2-135m",
            family="llama",
            layers=30,
            width=576,
            heads=9,
            key_heads=3,
            inner=1536,
            vocabulary=49_152,
        ),
        Shape(
            name="llama-small",
            family="llama",
            layers=4,
            width=256,
            heads=4,
            key_heads=4,
            inner=704,
            vocabulary=50_000,
        ),
        Shape(
            name="llama-1.5b",
            family="llama",
            layers=24,
            width=2048,
            heads=32,
            key_heads=8,
            inner=8192,
            vocabulary=128_256,
        ),
    )
}


def make_model(
    shape: Shape, *, extra: int, seed: int, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A random model with ``extra`` columns beyond the vocabulary, in eval mode."""
    common = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": shape.vocabulary + extra}
    torch.manual_seed(seed)
    with device:
        if shape.family == "gpt2":
            config = GPT2Config(
                n_layer=shape.layers,
                n_embd=shape.width,
                n_head=shape.heads,
                n_positions=shape.positions,
                **common,
            )
            model: PreTrainedModel = GPT2LMHeadModel(config)
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    num_hidden_layers=shape.layers,
                    hidden_size=shape.width,
                    num_attention_heads=shape.heads,
                    num_key_value_heads=shape.key_heads,
                    intermediate_size=shape.inner,
                    max_position_embeddings=shape.positions,
                    pad_token_id=None,
                    tie_word_embeddings=True,
                    **common,
                )
            )
    return model.to(dtype).eval()


def make_policy(shape: Shape, *, device: torch.device, dtype: torch.dtype) -> Policy:
    """A policy with reward tokens, as ``load_policy`` makes one."""
    backend = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    model = make_model(shape, extra=NUM_QUANTILES, seed=1, device=device, dtype=dtype)
    own_position = give_reward_token_its_own_position(model)
    ids = tuple(range(shape.vocabulary, shape.vocabulary + NUM_QUANTILES))
    return Policy(
        model,
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"),
        RewardTokens(
            ids=ids,
            texts=tuple(f"<|reward_{i}|>" for i in range(NUM_QUANTILES)),
            base_vocab_size=ids[0],
        ),
        num_leading_positions=int(own_position),
    )


def make_batch(
    shape: Shape, *, size: int, prompt: int, completion: int, device: torch.device
) -> TrainingBatch:
    """``size`` random sequences of the same length."""
    generator = torch.Generator().manual_seed(2)

    def tokens(length: int) -> Tensor:
        return torch.randint(0, shape.vocabulary, (size, length), generator=generator).to(device)

    lengths = torch.full((size,), completion)
    return TrainingBatch(
        reward_tokens=(shape.vocabulary + torch.arange(size) % NUM_QUANTILES).to(device),
        prompt_tokens=tokens(prompt),
        prompt_lengths=torch.full((size,), prompt, device=device),
        completion_tokens=tokens(completion),
        completion_lengths=lengths.to(device),
        token_index=valid_positions(lengths, completion).to(device),
    )


@dataclass(slots=True, kw_only=True)
class Workload:
    """Two models and a batch; each step leaves gradients in the policy and returns the loss."""

    policy: Policy
    reference: ReferencePolicy
    batch: TrainingBatch
    step: str
    autocast_dtype: torch.dtype | None

    def autocast(self) -> Any:  # noqa: ANN401 - autocast or nothing
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.policy.device.type, dtype=self.autocast_dtype)

    def clear(self) -> None:
        self.policy.model.zero_grad(set_to_none=True)

    def run(self) -> float:
        """The step of this workload."""
        match self.step:
            case "ours" | "cached" | "recomputed":
                return self.ours(PUBLISHED_TERMS)
            case "paper":
                return self.ours(PAPER_TERMS)
            case "published":
                return self.published()
            case "fine_tuning":
                return self.fine_tuning()
        raise ValueError(self.step)

    def ours(self, terms: QuarkObjectiveConfig) -> float:
        """What `Learner` does with a batch whose sequences are of one length."""
        objective = QuarkObjective(terms)
        with self.autocast():
            output = objective(
                self.policy,
                self.reference,
                self.batch,
                num_sequences=self.batch.num_sequences,
                num_tokens=self.batch.num_tokens,
            )
        output.loss.backward()
        return float(output.loss.detach())

    def published(self) -> float:
        """The published code's arithmetic: see the top of this file."""
        with self.autocast():
            loss, logged = published_loss(self.policy, self.reference, self.batch)
        loss.backward()
        del logged
        return float(loss.detach())

    def fine_tuning(self) -> float:
        """Supervised fine-tuning as commonly written: the library's own loss, the prompt masked."""
        inputs = self.batch.policy_inputs()
        batch = self.batch
        ids = torch.cat([inputs.input_ids, batch.completion_tokens[:, -1:]], dim=1)
        labels = ids.clone()
        labels[:, : -batch.completion_tokens.shape[1]] = -100
        with self.autocast():
            loss = self.policy.model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        return float(loss.detach())


def published_loss(
    policy: Policy, reference: ReferencePolicy, batch: TrainingBatch
) -> tuple[Tensor, Tensor]:
    """Token mean of -log pi + 0.05 KL(pi || p0) - 0.06 H, and the logged divergence, with its graph.

    Prompts carry no padding here; where the reward token's own position is used, it is used here too, so
    that both steps compute the same loss.
    """
    width, steps = batch.prompt_tokens.shape[1], batch.completion_tokens.shape[1]
    vocabulary = policy.reward_tokens.base_vocab_size

    def completion_logits(model: PreTrainedModel, prompt: Tensor, start: int) -> Tensor:
        ids = torch.cat([prompt, batch.completion_tokens], dim=1)
        positions = (start + torch.arange(ids.shape[1], device=ids.device)).expand_as(ids)
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
            use_cache=True,
        )
        # In float32 whatever the models ran in, as the published code has them.
        return output.logits.float()[:, prompt.shape[1] - 1 : -1]

    conditioned = torch.cat([batch.reward_tokens.unsqueeze(1), batch.prompt_tokens], dim=1)
    logits = completion_logits(policy.model, conditioned, 0)
    with torch.no_grad():
        assert isinstance(reference, FrozenReference)
        reference_logits = completion_logits(reference.model, batch.prompt_tokens, 0)
    assert logits.shape[:2] == (batch.num_sequences, steps)
    assert width == conditioned.shape[1] - 1
    log_all = F.log_softmax(logits, dim=-1)
    nll = -log_all.gather(2, batch.completion_tokens.unsqueeze(2)).squeeze(2)
    entropy = logits.logsumexp(-1) - (F.softmax(logits, dim=-1) * logits).sum(-1)
    base = logits[:, :, :vocabulary]

    def divergence() -> Tensor:
        return F.kl_div(
            F.log_softmax(reference_logits[:, :, :vocabulary], dim=-1),
            F.softmax(base, dim=-1),
            reduction="none",
        ).sum(-1)

    logged = divergence()
    loss = (nll + KL_COEF * divergence() - ENTROPY_COEF * entropy).mean()
    return loss, logged


PUBLISHED_TERMS = QuarkObjectiveConfig(
    kl_coef=KL_COEF,
    kl_direction=KLDirection.POLICY_TO_REFERENCE,
    entropy_coef=ENTROPY_COEF,
    reduction=Reduction.TOKEN_MEAN,
    lm_softmax=LMSoftmax.ENLARGED,
)
PAPER_TERMS = QuarkObjectiveConfig(kl_coef=KL_COEF)


def make_workload(
    shape: Shape,
    *,
    step: str,
    size: int,
    prompt: int,
    completion: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Workload:
    """Models with float32 weights and a batch; ``ours`` has the models as `quark` loads them."""
    policy = make_policy(shape, device=device, dtype=torch.float32)
    reference = make_model(shape, extra=0, seed=0, device=device, dtype=torch.float32)
    is_ours = step in ("ours", "cached", "recomputed", "paper")
    if is_ours:
        fuse_activations(policy.model)
        fuse_activations(reference)
    if step == "recomputed":
        recompute_layers(policy.model)
    load = Workload(
        policy=policy,
        reference=FrozenReference(reference, autocast_dtype=autocast if is_ours else None),
        batch=make_batch(shape, size=size, prompt=prompt, completion=completion, device=device),
        step=step,
        autocast_dtype=autocast,
    )
    if step == "cached":
        load.reference = KeptReference(load)
    return load


class KeptReference(ReferencePolicy):
    """The rows of one batch, kept in half precision: what a step takes with `reference.cache`, whose rows
    come from a map of the run's files in their place."""

    def __init__(self, load: Workload) -> None:
        self._inner = load.reference
        with torch.no_grad(), load.autocast():
            rows = self._inner.completion_rows(load.batch).rows
        self._rows = rows.to(load.autocast_dtype or torch.float16)
        self._dtype = self._inner.causal.head_dtype

    @property
    def causal(self) -> CausalModel:
        return self._inner.causal

    def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
        if len(self._rows) != batch.num_tokens:  # a smaller batch, to warm up
            return self._inner.completion_rows(batch)
        return CompletionRows(rows=self._rows.to(self._dtype), head=self.causal.head, parameters=())
