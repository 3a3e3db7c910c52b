"""Families of causal language models, built from their configurations in transformers, small enough for a CPU.

A family is built by giving its configuration the values of ``_SMALL`` under every name that it knows, and a few
values of its own. ``scripts/model_matrix.py`` tries all of them, and the tests a few.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 257
"""256 bytes and an end-of-sequence token."""
EOS_ID = 256
CONTEXT = 64

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "lru_width", "attention_hidden_size"), 32
    ),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers"), 2),
    **dict.fromkeys(
        ("n_head", "n_heads", "num_heads", "num_attention_heads", "attention_heads"), 4
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "dff"), 64),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
        CONTEXT,
    ),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    "num_key_value_heads": 2,
    "head_dim": 8,
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "moe_layer_start_index"), 1),
    # compressed attention
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    # states
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_d_head", "mamba_n_heads"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_expand": 2,
    "conv_kernel": 4,
    "use_mamba_kernels": False,
    **dict.fromkeys(("sliding_window", "attention_window_size"), 8),
    "rotary_dim": 4,
}
_PLAIN: dict[str, Any] = {}
_CAUSAL = {"is_decoder": True}
_COMPRESSED = {"num_key_value_heads": 4}
_LINEAR = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
_CONVOLVED = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
_DECODER = {
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "is_decoder": True,
}
_PADDING_FIRST = {"is_decoder": True, "pad_token_id": 1}

FAMILIES: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        [
            "afmoe",
            "apertus",
            "arcee",
            "aria_text",
            "beam",
            "biogpt",
            "bitnet",
            "bloom",
            "codegen",
            "cohere",
            "cohere2",
            "cohere2_moe",
            "cpmant",
            "ctrl",
            "cwm",
            "deepseek_v4",
            "diffllama",
            "doge",
            "dots1",
            "ernie4_5",
            "ernie4_5_moe",
            "exaone4",
            "exaone_moe",
            "falcon",
            "falcon_mamba",
            "flex_olmo",
            "gemma",
            "gemma2",
            "gemma3_text",
            "glm",
            "glm4",
            "glm4_moe",
            "gpt2",
            "gpt_bigcode",
            "gpt_neox",
            "gpt_neox_japanese",
            "gpt_oss",
            "gptj",
            "granite",
            "granite_swa",
            "granitemoe",
            "granitemoeshared",
            "helium",
            "hunyuan_v1_dense",
            "hunyuan_v1_moe",
            "hy_v3",
            "hyperclovax",
            "jais2",
            "jetmoe",
            "laguna",
            "llama",
            "llama4_text",
            "mamba",
            "mellum",
            "mimo_v2_flash",
            "minimax",
            "minimax_m2",
            "ministral",
            "ministral3",
            "mistral",
            "mixtral",
            "modernbert-decoder",
            "moshi",
            "mpt",
            "nanochat",
            "nemotron",
            "nemotron_h",
            "olmo",
            "olmo2",
            "olmo3",
            "olmo_hybrid",
            "olmoe",
            "openai-gpt",
            "opt",
            "persimmon",
            "phi",
            "phi3",
            "phimoe",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
            "rwkv",
            "seed_oss",
            "smollm3",
            "solar_open",
            "stablelm",
            "starcoder2",
            "vaultgemma",
            "xlstm",
        ],
        _PLAIN,
    ),
    **dict.fromkeys(
        (
            "axk1",
            "deepseek_v2",
            "deepseek_v32",
            "glm4_moe_lite",
            "longcat_flash",
            "minicpm3",
            "youtu",
        ),
        _COMPRESSED,
    ),
    "deepseek_v3": _COMPRESSED | {"first_k_dense_replace": 1},
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _LINEAR),
    "bailing_hybrid": _LINEAR | _COMPRESSED,
    **dict.fromkeys(("lfm2", "lfm2_moe"), _CONVOLVED),
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "plbart"), _DECODER),
    **dict.fromkeys(("bert", "roformer"), _CAUSAL),
    **dict.fromkeys(("camembert", "roberta"), _PADDING_FIRST),
    "electra": {"is_decoder": True, "embedding_size": 32},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], "mamba_n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": None,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_groups": 1,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlm": {"causal": True},
    "xglm": {"pad_token_id": 1},
}
"""Names of transformers' model types, with what their small configurations need besides ``_SMALL``."""


def small_config(name: str, **changes: Any) -> Any:  # noqa: ANN401 - every family has its own class
    """The configuration of a family's small model, with some values changed."""
    kind = type(AutoConfig.for_model(name))
    known = kind()
    values = {
        key: value
        for key, value in _SMALL.items()
        if hasattr(known, key) and not isinstance(getattr(kind, key, None), property)
    }
    own = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), EOS_ID)
    return kind(**(values | own | dict(FAMILIES[name]) | changes))


def small_model(name: str, **changes: Any) -> PreTrainedModel:  # noqa: ANN401 - as above
    """A random model of a family, in eval mode, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(small_config(name, **changes)).eval()
