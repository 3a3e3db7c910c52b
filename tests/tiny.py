"""Tiny random models and a byte tokenizer, made in memory: what tests use wherever a language model is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from quark.data.collate import TrainingBatch, collate
from quark.models.policy import Policy
from quark.models.positions import give_reward_token_its_own_position
from quark.models.reward_tokens import add_reward_tokens

EOS = "<|endoftext|>"
EOS_ID = 256
VOCAB_SIZE = 257
"""256 bytes and the end-of-sequence token."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and `<|endoftext|>` (id 256) for eos; no pad token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def tiny_gpt2(
    vocab: int = VOCAB_SIZE, *, seed: int = 0, tied: bool = True, positions: int = 64
) -> PreTrainedModel:
    """A random GPT-2: 2 layers, d 32, learned absolute positions, in eval mode, float32."""
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=positions,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def tiny_llama(vocab: int = VOCAB_SIZE, *, seed: int = 0, tied: bool = True) -> PreTrainedModel:
    """A random Llama: 2 layers, d 32, rotary positions, grouped-query attention, in eval mode, float32."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=None,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Write a tiny model (GPT-2 by default) with the byte tokenizer as an ordinary model folder; return it."""
    (tiny_gpt2() if model is None else model).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny_policy(
    model: PreTrainedModel | None = None,
    *,
    num_quantiles: int = 5,
    seed: int = 0,
    shift_positions: bool = True,
) -> Policy:
    """A policy around a tiny model (GPT-2 by default), as ``load_policy`` makes it from a folder."""
    model = tiny_gpt2() if model is None else model
    tokenizer = byte_tokenizer()
    own_position = shift_positions and give_reward_token_its_own_position(model)
    tokens = add_reward_tokens(model, tokenizer, num_quantiles, seed=seed)
    return Policy(model, tokenizer, tokens, num_leading_positions=int(own_position))


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Samples padded as a pool's minibatch is."""

    quantiles: NDArray[np.int16]
    prompt_tokens: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    completion_tokens: NDArray[np.int64]
    completion_lengths: NDArray[np.int32]


def padded(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    quantiles: Sequence[int],
    *,
    pad_id: int = EOS_ID,
    extra: int = 0,
) -> Samples:
    """Pad prompts on the left and completions on the right, by ``extra`` columns more than needed."""
    width = max(map(len, prompts)) + extra
    steps = max(map(len, completions)) + extra
    return Samples(
        quantiles=np.array(quantiles, dtype=np.int16),
        prompt_tokens=np.array([[pad_id] * (width - len(p)) + list(p) for p in prompts]),
        prompt_lengths=np.array([len(p) for p in prompts], dtype=np.int32),
        completion_tokens=np.array([list(c) + [pad_id] * (steps - len(c)) for c in completions]),
        completion_lengths=np.array([len(c) for c in completions], dtype=np.int32),
    )


PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14], [15, EOS_ID, 16], [17]]
COMPLETIONS = [
    [20, 21, EOS_ID],
    [22, 23, 24, 25, 26],
    [EOS_ID],
    [27, 28],
    [29, EOS_ID],
    [30, 31, 32],
]
"""Of many lengths; the eos id occurs inside a prompt, and it is also the filler."""


def tiny_batch(policy: Policy, *, extra: int = 0) -> TrainingBatch:
    """Six samples of different lengths as a training batch for ``policy``."""
    quantiles = [i % policy.reward_tokens.num_quantiles for i in range(len(PROMPTS))]
    samples = padded(PROMPTS, COMPLETIONS, quantiles, pad_id=policy.pad_id, extra=extra)
    return collate(samples, policy.reward_tokens.ids, policy.pad_id, policy.device)
