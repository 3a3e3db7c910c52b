"""Tiny random models and a byte tokenizer, made in memory: what tests use wherever a language model is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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
