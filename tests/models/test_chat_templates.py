"""Chat models: the saved model answers conversations under the best reward token."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, pipeline

from quark.models.config import ModelConfig
from quark.models.loading import load_policy, load_saved_policy
from tests.tiny import byte_tokenizer, tiny_llama

TEMPLATES = {
    "Llama 3": (
        "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
        "+ m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    ),
    "Qwen 3": (
        "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for t in tools %}{{- t | tojson }}{%- endfor %}"
        "{{- '<|im_end|>\\n' }}{%- endif %}"
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
        "{%- endif %}{%- endif %}"
    ),
    "Gemma 3": (
        "{{ bos_token }}{%- for m in messages -%}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) "
        "+ '\\n' + m.content | trim + '<end_of_turn>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
    ),
    "Mistral": (
        "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}"
        "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "Phi 4": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "gpt-oss": (
        "{#- a comment -#}{%- macro turn(m) -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
        "{%- endmacro -%}{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort | default('medium')) "
        "+ '<|end|>' }}{%- for m in messages %}{{- turn(m) }}{%- endfor %}"
        "{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"
    ),
}
MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]


def chat_tokenizer(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": AddedToken("<s>", special=True, normalized=False)})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_saved_chat_model_answers_under_the_best_token(name, tmp_path):
    tokenizer = chat_tokenizer(TEMPLATES[name])
    model = tiny_llama(258)
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    policy = load_policy(ModelConfig(name=str(tmp_path / "base")), num_quantiles=3, seed=0)
    policy.save(tmp_path / "model")

    def ids_of(tokenizer):
        return tokenizer.apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_dict=True
        ).input_ids

    plain = ids_of(tokenizer)
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert ids_of(saved) == [policy.reward_tokens.best, *plain]
    assert ids_of(load_saved_policy(tmp_path / "model").tokenizer) == plain

    ids = torch.tensor([[policy.reward_tokens.best, *plain]])
    for _ in range(4):
        logits = policy.model(ids).logits[:, -1, : policy.reward_tokens.base_vocab_size]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    expected = tokenizer.decode(ids[0, 1 + len(plain) :], skip_special_tokens=True)
    answer = pipeline("text-generation", model=str(tmp_path / "model"))(
        MESSAGES, max_new_tokens=4, do_sample=False, temperature=None, top_p=None
    )
    found = answer[0]["generated_text"][-1]
    assert found["role"] == "assistant"
    assert expected.startswith(found["content"])
    assert found["content"]
