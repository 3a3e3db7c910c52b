"""Sampling with a transformers model, every setting explicit, on the tokens that training will see.

quark has its own loop for four reasons: a token's log-probability is taken from the untruncated distribution
that it was sampled from; nothing outside the base vocabulary can be sampled; finished rows leave the
batch; and every row has its own stream of random numbers, so that a completion depends on (seed, row,
weights) and not on how rows were batched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quark.errors import ModelError
from quark.generation.base import SamplingConfig
from quark.generation.distribution import (
    allowed_logits,
    draw,
    guiding_tilt,
    is_guided_away,
    probabilities_of,
)
from quark.generation.prompting import CompletionTexts, PromptRules
from quark.models.batch import pad_left, prepend
from quark.models.causal import CausalModel
from quark.models.context import context_length
from quark.models.policy import Policy, pad_id, stop_ids
from quark.models.precision import projections_for_autocast
from quark.models.reward_tokens import RewardTokens
from quark.models.token_critic import CriticSlot
from quark.types import Completion, FinishReason, Prompt


class TransformersGenerator:
    """Samples completions from a policy, or from a model without reward tokens.

    Completions carry ``logprob_policy``: the sum of their log-probabilities under the untruncated
    distribution at temperature 1 over the base vocabulary, whatever distribution was sampled
    (guided or not), which is the figure that training computes. ``logprob_sampled`` is the same sum
    under the distribution that the tokens were drawn from. ``logprob_reference`` stays NaN.

    Args:
        policy_or_model: a ``Policy``, a plain causal LM, or one that is already wrapped (the reference's).
        tokenizer: decodes, and names the end-of-sequence token.
        reward_tokens: never sampled; None only where the model has none.
        config: how to sample.
        device: where the model is.
        critics: holds the critic that guides; None is the policy's own, if a policy is given.
    """

    def __init__(
        self,
        policy_or_model: Policy | PreTrainedModel | CausalModel,
        tokenizer: PreTrainedTokenizerBase,
        reward_tokens: RewardTokens | None,
        config: SamplingConfig,
        device: torch.device,
        *,
        critics: CriticSlot | None = None,
    ) -> None:
        self._critics = critics or CriticSlot()
        if isinstance(policy_or_model, Policy):
            self._critics = critics or policy_or_model.critics
            self._causal = policy_or_model.causal
            reward_tokens = reward_tokens or policy_or_model.reward_tokens
        elif isinstance(policy_or_model, CausalModel):
            self._causal = policy_or_model
        else:
            self._causal = CausalModel(policy_or_model)
        self._config = config
        self._device = device
        # Distributions are inverted in float64, which Apple's GPUs lack.
        self._home = torch.device("cpu") if device.type == "mps" else device
        model = self._causal.model
        if reward_tokens is None:
            num_columns = model.get_output_embeddings().weight.shape[0]
            self._width = min(num_columns, max(tokenizer.get_vocab().values()) + 1)
        else:
            self._width = reward_tokens.base_vocab_size
        self._pad_id = pad_id(tokenizer)
        self._stop_ids = torch.tensor(
            [i for i in stop_ids(model, tokenizer) if i < self._width],
            dtype=torch.int64,
            device=device,
        )
        self._texts = CompletionTexts(tokenizer)
        self._rules = PromptRules(
            reward_tokens=reward_tokens,
            vocab_size=self._width,
            max_positions=context_length(model.config),
            max_new_tokens=config.max_new_tokens,
        )

    def batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The rows that are sampled together: rows of similar length, shorter ones first.

        They are of one length if the model does not mask padding.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        parts = [order]
        if not self._causal.running.masks_padding:
            by_length = itertools.groupby(order, key=lambda i: len(prompts[i].token_ids))
            parts = [list(rows) for _, rows in by_length]
        size = self._config.batch_size
        return [part[start : start + size] for part in parts for start in range(0, len(part), size)]

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        quantile: int | None,
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order; see ``Generator``.

        Args:
            prompts: repeat a prompt for several completions of it.
            quantile: condition on this quantile's reward token; None gives no token.
            seed: u64.
            rows: sample only for these prompts, in this order. Where they are some of the whole
                ``batches``, they get the same bits as among all.

        Raises:
            ValueError: an empty prompt, an id outside the base vocabulary, or a quantile that is not there.
            ModelError: prompt and completion do not fit the model's context, or it gave NaN.
        """
        reward_token = self._rules.reward_token(quantile)
        self._rules.check(prompts)
        # One row of numbers per prompt, whatever batch it lands in. Below 1 by more than the
        # rounding of a cumulative sum, so the last step of a distribution is never overshot.
        uniforms = np.random.default_rng(seed).random((len(prompts), self._config.max_new_tokens))
        uniforms *= 1.0 - 2.0**-32
        wanted = set(range(len(prompts)) if rows is None else rows)
        completions: dict[int, Completion] = {}
        away = self._rules.reward_token(0) if is_guided_away(self._config, quantile) else None
        tilt = guiding_tilt(
            self._config,
            self._critics.critic,
            quantile=quantile,
            num_quantiles=self._rules.num_quantiles,
            device=self._home,
        )
        model = self._causal.model
        with evaluating(model), torch.inference_mode(), projections_for_autocast(model):
            for whole in self.batches(prompts):
                batch = [row for row in whole if row in wanted]
                if not batch:
                    continue
                sampled = self._sample(
                    [prompts[i].token_ids for i in batch], uniforms[batch], reward_token, away, tilt
                )
                sampled_batch = self._completions(prompts, batch, sampled, quantile, seed)
                completions.update(zip(batch, sampled_batch, strict=True))
        return [completions[row] for row in (range(len(prompts)) if rows is None else rows)]

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: NDArray[np.float64],
        reward_token: int | None,
        away: int | None,
        tilt: Tensor | None,
    ) -> _Sampled:
        """Sample one batch; with ``away``, the model sees each row a second time under that reward token."""
        config, device, home = self._config, self._device, self._home
        num_rows, num_steps = len(prompts), config.max_new_tokens
        input_ids, lengths = (t.to(device) for t in pad_left(prompts, self._pad_id))
        if reward_token is not None:
            # Row by row under the reward token, then row by row under the one to be guided away from.
            tokens_of_copies = [reward_token] if away is None else [reward_token, away]
            copies = [
                prepend(input_ids, lengths, torch.full_like(lengths, token))
                for token in tokens_of_copies
            ]
            input_ids, lengths = (torch.cat(parts) for parts in zip(*copies, strict=True))
        num_copies = len(input_ids) // num_rows
        columns = torch.arange(input_ids.shape[1], device=device)
        mask = (columns >= (input_ids.shape[1] - lengths).unsqueeze(1)).long()
        positions = self._causal.positions(mask, is_conditioned=reward_token is not None)

        tokens = torch.full((num_rows, num_steps), self._pad_id, dtype=torch.int64, device=home)
        logprobs, drawn_logprobs = torch.zeros(2, num_rows, dtype=torch.float64, device=home)
        counts = torch.zeros(num_rows, dtype=torch.int64, device=home)
        stopped = torch.zeros(num_rows, dtype=torch.bool, device=home)
        numbers = torch.from_numpy(uniforms).to(home)

        rows = torch.arange(num_rows, device=home)
        """Rows of the batch that are still running."""
        alive = torch.ones(num_rows, dtype=torch.bool, device=home)
        """Per running row: not ended yet."""
        new_ids, new_positions, cache = input_ids, positions, None
        for step in range(num_steps):
            logits, cache = self._causal.next_logits(new_ids, mask, new_positions, cache)
            logits = logits[:, : self._width].float().to(home)
            sampled, token_logprobs, token_drawn_logprobs = self._pick(
                logits[: len(rows)],
                numbers[rows, step],
                step,
                away=None if num_copies == 1 else logits[len(rows) :],
                tilt=tilt,
            )
            live = rows[alive]
            tokens[live, step] = sampled[alive]
            logprobs[live] += token_logprobs[alive]
            drawn_logprobs[live] += token_drawn_logprobs[alive]
            counts[live] += 1
            ends = torch.isin(sampled, self._stop_ids) & alive
            stopped[rows[ends]] = True
            alive = alive & ~ends
            num_alive = int(alive.sum())
            if num_alive == 0 or step + 1 == num_steps:
                break
            one = mask.new_ones(len(mask), 1)
            mask = torch.cat([mask, one], 1)
            input_ids = torch.cat([input_ids, sampled.repeat(num_copies)[:, None].to(device)], 1)
            positions = torch.cat([positions, positions[:, -1:] + 1], 1)
            leave_by = self._causal.running.leave_by
            if num_alive <= 0.75 * len(rows) and (cache is None or leave_by is not None):
                kept = alive.nonzero().squeeze(1)
                num_before = len(rows)
                rows, alive = rows[kept], alive[kept]
                kept = torch.cat([kept + i * num_before for i in range(num_copies)]).to(device)
                if cache is not None and leave_by is not None:
                    getattr(cache, leave_by)(kept)
                mask, input_ids, positions = mask[kept], input_ids[kept], positions[kept]
            if cache is None:
                new_ids, new_positions = input_ids, positions
            else:
                new_ids, new_positions = input_ids[:, -1:], positions[:, -1:]
        if not bool(torch.isfinite(logprobs).all()):
            raise ModelError(
                "the model gave NaN or infinite logits while sampling: its weights are broken"
            )
        return _Sampled(
            tokens=tokens.cpu().numpy().astype(np.uint32),
            counts=counts.cpu().numpy(),
            stopped=stopped.cpu().numpy(),
            logprobs=logprobs.cpu().numpy(),
            drawn_logprobs=drawn_logprobs.cpu().numpy(),
        )

    def _pick(
        self,
        logits: Tensor,
        numbers: Tensor,
        step: int,
        *,
        away: Tensor | None,
        tilt: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled ids [B], and their log-probabilities [B] before any guidance and truncation and [B] as drawn.

        Args:
            logits: float32 [B, W].
            numbers: float64 [B] uniform in [0, 1).
            step: tokens sampled so far.
            away: float32 [B, W] logits to guide away from.
            tilt: float32 [W] what a critic adds to the logits.
        """
        config = self._config
        log_z = logits.logsumexp(-1)
        allowed = allowed_logits(
            logits, config, away=away, tilt=tilt, forbidden=self._forbidden(step)
        )
        if config.temperature == 0.0:
            sampled = allowed.argmax(-1)
            drawn_logprobs = torch.zeros_like(log_z)
        else:
            sampled, drawn_logprobs = draw(probabilities_of(allowed, config), numbers)
        logprobs = logits.gather(1, sampled.unsqueeze(1)).squeeze(1) - log_z
        if away is None and tilt is None and config.is_plain_unguided:
            # The same by definition; here to the last bit.
            drawn_logprobs = logprobs
        return sampled, logprobs, drawn_logprobs

    def _forbidden(self, step: int) -> Tensor | None:
        """Tokens that may not be the completion's token ``step``: bool [1, W]; None where all may."""
        if step >= self._config.min_new_tokens or not len(self._stop_ids):
            return None
        mask = torch.zeros(1, self._width, dtype=torch.bool, device=self._stop_ids.device)
        return mask.index_fill_(1, self._stop_ids, True)

    def _completions(
        self,
        prompts: Sequence[Prompt],
        rows: Sequence[int],
        sampled: _Sampled,
        quantile: int | None,
        seed: int,
    ) -> Iterator[Completion]:
        token_ids = [
            tokens[:count] for tokens, count in zip(sampled.tokens, sampled.counts, strict=True)
        ]
        texts = self._texts(
            [prompts[row].token_ids for row in rows], [ids.tolist() for ids in token_ids]
        )
        for i, row in enumerate(rows):
            yield Completion(
                prompt=prompts[row],
                token_ids=token_ids[i],
                text=texts[i],
                finish_reason=FinishReason.STOP if sampled.stopped[i] else FinishReason.LENGTH,
                reward_quantile=quantile,
                seed=seed,
                logprob_policy=float(sampled.logprobs[i]),
                logprob_sampled=float(sampled.drawn_logprobs[i]),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampled:
    tokens: NDArray[np.uint32]
    """[B, T]"""
    counts: NDArray[np.int64]
    """[B] tokens sampled, the end-of-sequence token included."""
    stopped: NDArray[np.bool_]
    """[B] whether the last one is an end-of-sequence token."""
    logprobs: NDArray[np.float64]
    """[B] sums in nats, before any guidance and truncation."""
    drawn_logprobs: NDArray[np.float64]
    """[B] sums in nats under the sampled distribution."""


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within: ``model`` is in eval mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
