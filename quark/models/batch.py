"""A training minibatch as tensors, and the two views of it that the policy and the reference see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """The input of a causal LM: rows padded on both sides, with no padding inside."""

    input_ids: Tensor
    """int64 [B, L]"""
    attention_mask: Tensor
    """int64 [B, L], 1 on real tokens; made from lengths, so a pad id may equal an end-of-sequence id."""
    token_positions: Tensor
    """int64 [M] flat positions in [B, L] whose next-token distributions predict the completion tokens."""
    is_conditioned: bool
    """Whether every row begins with a reward token."""

    def from_the_first_column(self) -> ModelInputs:
        """The same rows with all their padding on the right."""
        length = self.input_ids.shape[1]
        begin = self.attention_mask.argmax(1)
        column = torch.arange(length, device=begin.device)
        source = (column + begin.unsqueeze(1)) % length
        row = self.token_positions // length
        return ModelInputs(
            input_ids=self.input_ids.gather(1, source),
            attention_mask=self.attention_mask.gather(1, source),
            token_positions=self.token_positions - begin[row],
            is_conditioned=self.is_conditioned,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierTokens:
    """The tokens before each of M completion tokens in its own sequence, without the reward token."""

    sequences: Tensor
    """int64 [B, L] prompts and completions, padded on both sides."""
    row: Tensor
    """int64 [M] the sequence of each completion token."""
    begin: Tensor
    """int64 [M] the column where its prompt begins."""
    end: Tensor
    """int64 [M] its own column."""

    def other_than(self, targets: Tensor, places: slice, width: int) -> Tensor:
        """Which columns of the vocabulary are earlier tokens, other than the token itself: bool [m, ``width``].

        Args:
            targets: int64 [m] the completion tokens at ``places``.
            places: m of the M completion tokens.
            width: columns of the vocabulary; all ids are below it.
        """
        sequences = self.sequences[self.row[places]]
        column = torch.arange(sequences.shape[1], device=sequences.device)
        is_earlier = (column >= self.begin[places].unsqueeze(1)) & (
            column < self.end[places].unsqueeze(1)
        )
        # The last column is of no token: it takes what does not count.
        found = torch.zeros(len(targets), width + 1, dtype=torch.bool, device=targets.device)
        found.scatter_(1, sequences.masked_fill(~is_earlier, width), value=True)
        found.scatter_(1, targets.unsqueeze(1), value=False)
        return found[:, :width]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """B sampled sequences with M completion tokens in all, end-of-sequence tokens included.

    The completion tokens are taken flat, row after row: padding is never projected on the vocabulary.
    """

    reward_tokens: Tensor
    """int64 [B] ids of the reward tokens."""
    prompt_tokens: Tensor
    """int64 [B, P] left-padded."""
    prompt_lengths: Tensor
    """int64 [B], at least 1."""
    completion_tokens: Tensor
    """int64 [B, T] right-padded."""
    completion_lengths: Tensor
    """int64 [B], at least 1."""
    sample_ids: Tensor | None = None
    """int64 [B] ids of the samples in the run's pool; None for texts that are not in it."""
    other_tokens: Tensor | None = None
    """int64 [B, n] ids of the reward tokens that each sample's own one is contrasted with; None for
    no contrast."""
    advantages: Tensor | None = None
    """float32 [B] standardized ranks, higher is better; None for no advantage."""
    sampled_logprobs: Tensor | None = None
    """float32 [B] the completions' log-probabilities when they were sampled, in nats; beside ``advantages``."""
    tilt_tokens: Tensor | None = None
    """int64 [B] ids of the reward tokens whose tilts the samples learn; None for no tilt."""
    token_index: Tensor
    """int64 [M] the valid positions of ``completion_tokens``, flattened."""

    @property
    def num_sequences(self) -> int:
        """Number B of sequences."""
        return self.completion_tokens.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number M of completion tokens."""
        return self.token_index.shape[0]

    @property
    def has_padding(self) -> bool:
        """Whether the prompts, or the completions, are of different lengths."""
        return any(
            bool((lengths != width).any())
            for lengths, width in (
                (self.prompt_lengths, self.prompt_tokens.shape[1]),
                (self.completion_lengths, self.completion_tokens.shape[1]),
            )
        )

    @property
    def targets(self) -> Tensor:
        """int64 [M] the completion tokens, row after row."""
        return self.completion_tokens.flatten()[self.token_index]

    def policy_inputs(self) -> ModelInputs:
        """``[reward token][prompt][completion]``, the reward token directly before the prompt."""
        return self._inputs(is_conditioned=True)

    def reference_inputs(self) -> ModelInputs:
        """``[prompt][completion]``."""
        return self._inputs(is_conditioned=False)

    def _inputs(self, *, is_conditioned: bool) -> ModelInputs:
        prompt, lengths = self.prompt_tokens, self.prompt_lengths
        if is_conditioned:
            prompt, lengths = prepend(prompt, lengths, self.reward_tokens)
        width, steps = prompt.shape[1], self.completion_tokens.shape[1]
        # The last completion token predicts nothing that is trained, so it is not run.
        length = width + steps - 1
        input_ids = torch.cat([prompt, self.completion_tokens[:, :-1]], dim=1)
        column = torch.arange(length, device=input_ids.device)
        begin = (width - lengths).unsqueeze(1)
        end = (width + self.completion_lengths).unsqueeze(1)
        mask = (column >= begin) & (column < end)
        row = self.token_index // steps
        return ModelInputs(
            input_ids=input_ids,
            attention_mask=mask.long(),
            token_positions=row * length + (width - 1) + self.token_index % steps,
            is_conditioned=is_conditioned,
        )

    def earlier_tokens(self) -> EarlierTokens:
        """The tokens of prompt and completion before each completion token."""
        width, steps = self.prompt_tokens.shape[1], self.completion_tokens.shape[1]
        row = self.token_index // steps
        return EarlierTokens(
            sequences=torch.cat([self.prompt_tokens, self.completion_tokens], dim=1),
            row=row,
            begin=(width - self.prompt_lengths)[row],
            end=width + self.token_index % steps,
        )

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """Sums of per-token ``values`` [M] over each sequence: [B]."""
        sums = values.new_zeros(self.num_sequences)
        return sums.index_add(0, self.token_index // self.completion_tokens.shape[1], values)

    def under(self, reward_tokens: Tensor) -> TrainingBatch:
        """Every sequence under each of C reward tokens: C copies of the batch, one after another.

        Args:
            reward_tokens: int64 [C, B] ids.
        """
        copies = len(reward_tokens)

        def repeat(tensor: Tensor) -> Tensor:
            return tensor.repeat(copies, *(1,) * (tensor.dim() - 1))

        size = self.completion_tokens.numel()
        starts = torch.arange(copies, device=self.token_index.device).unsqueeze(1) * size
        return TrainingBatch(
            reward_tokens=reward_tokens.flatten(),
            prompt_tokens=repeat(self.prompt_tokens),
            prompt_lengths=repeat(self.prompt_lengths),
            completion_tokens=repeat(self.completion_tokens),
            completion_lengths=repeat(self.completion_lengths),
            sample_ids=None if self.sample_ids is None else repeat(self.sample_ids),
            token_index=(starts + self.token_index).flatten(),
        )

    def split(self, num_parts: int) -> list[TrainingBatch]:
        """Up to ``num_parts`` micro-batches of similar size, sequences of similar length together.

        Sums over the parts equal sums over the whole; less padding is computed than for the whole batch.
        """
        if num_parts <= 1 or self.num_sequences == 1:
            return [self]
        order = torch.argsort(self.prompt_lengths + self.completion_lengths, stable=True)
        return [self._select(rows) for rows in torch.tensor_split(order, num_parts) if len(rows)]

    def _select(self, rows: Tensor) -> TrainingBatch:
        prompt_lengths, completion_lengths = (
            self.prompt_lengths[rows],
            self.completion_lengths[rows],
        )
        width, steps = int(prompt_lengths.max()), int(completion_lengths.max())
        return TrainingBatch(
            reward_tokens=self.reward_tokens[rows],
            prompt_tokens=self.prompt_tokens[rows, self.prompt_tokens.shape[1] - width :],
            prompt_lengths=prompt_lengths,
            completion_tokens=self.completion_tokens[rows, :steps],
            completion_lengths=completion_lengths,
            sample_ids=None if self.sample_ids is None else self.sample_ids[rows],
            other_tokens=None if self.other_tokens is None else self.other_tokens[rows],
            advantages=None if self.advantages is None else self.advantages[rows],
            sampled_logprobs=None if self.sampled_logprobs is None else self.sampled_logprobs[rows],
            tilt_tokens=None if self.tilt_tokens is None else self.tilt_tokens[rows],
            token_index=valid_positions(completion_lengths, steps),
        )


def prepend(tokens: Tensor, lengths: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Put ``first`` [B] directly before left-padded ``tokens`` [B, P]: tokens [B, P + 1] and their lengths."""
    wider = torch.cat([tokens[:, :1], tokens], dim=1)
    wider = wider.scatter(1, (tokens.shape[1] - lengths).unsqueeze(1), first.unsqueeze(1))
    return wider, lengths + 1


def valid_positions(lengths: Tensor, width: int) -> Tensor:
    """Flat indices [M] of the first ``lengths[b]`` places of each row of a [B, ``width``] tensor."""
    valid = torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)
    return valid.flatten().nonzero().squeeze(1)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Left-padded int64 [B, P] and lengths int64 [B] of token lists, on the CPU."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
    return tokens, torch.tensor([len(row) for row in rows], dtype=torch.int64)
