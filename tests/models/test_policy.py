from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from quark.errors import ModelError
from quark.models.config import ModelConfig
from quark.models.loading import load_policy, load_saved_policy
from quark.models.logprobs import token_nll
from quark.models.reward_tokens import REWARD_TOKENS_FILE
from tests.tiny import (
    EOS_ID,
    VOCAB_SIZE,
    byte_tokenizer,
    save_tiny,
    tiny_batch,
    tiny_gpt2,
    tiny_llama,
    tiny_policy,
)

MODELS = {
    "gpt2 tied": tiny_gpt2,
    "gpt2 untied": lambda: tiny_gpt2(tied=False),
    "llama tied": tiny_llama,
    "llama untied": lambda: tiny_llama(tied=False),
}


@pytest.fixture(params=MODELS)
def policy(request):
    return tiny_policy(MODELS[request.param]())


def nll(policy):
    batch = tiny_batch(policy)
    width = policy.reward_tokens.base_vocab_size
    return token_nll(policy.completion_rows(batch), batch.targets, base_vocab_size=width)


def test_a_saved_policy_comes_back_as_it_was(policy, tmp_path):
    policy.save(tmp_path / "model")
    again = load_saved_policy(tmp_path / "model")
    assert again.reward_tokens == policy.reward_tokens
    assert again.num_leading_positions == policy.num_leading_positions
    assert again.tokenizer("abc").input_ids == policy.tokenizer("abc").input_ids
    state, state_again = policy.model.state_dict(), again.model.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(value, state_again[name]) for name, value in state.items())
    # A loaded model has fused activations, the fixture's has not: equal up to rounding.
    torch.testing.assert_close(nll(again), nll(policy))
    again.save(tmp_path / "again")
    assert load_saved_policy(tmp_path / "again").reward_tokens == policy.reward_tokens


def test_plain_transformers_put_the_best_token_first(policy, tmp_path):
    policy.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    plain = policy.tokenizer("abc").input_ids
    assert tokenizer("abc").input_ids == [policy.reward_tokens.best, *plain]
    assert tokenizer("abc", add_special_tokens=False).input_ids == plain
    lowest = policy.reward_tokens.texts[0] + "abc"
    assert tokenizer(lowest, add_special_tokens=False).input_ids == [
        policy.reward_tokens.ids[0],
        *plain,
    ]


def test_an_ordinary_pipeline_gives_what_the_best_token_gives(policy, tmp_path):
    policy.save(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    prompt = policy.tokenizer("Hello").input_ids
    ids = torch.tensor([[policy.reward_tokens.best, *prompt]])
    for _ in range(8):
        logits = policy.model(ids).logits[:, -1, :VOCAB_SIZE]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == EOS_ID:
            break
    expected = policy.tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
    found = generate("Hello", max_new_tokens=8, do_sample=False, temperature=None, top_p=None)
    assert found[0]["generated_text"] == expected


def test_an_ordinary_model_samples_from_everything_but_the_reward_tokens(policy, tmp_path):
    with torch.no_grad():
        head = policy.model.get_output_embeddings()
        head.weight[VOCAB_SIZE:] *= 30.0
    policy.save(tmp_path, max_new_tokens=12)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = model.generation_config
    assert (config.do_sample, config.top_k, config.top_p, config.temperature) == (True, 0, 1.0, 1.0)
    assert config.max_new_tokens == 12
    inputs = tokenizer(["Hello"] * 64, return_tensors="pt")
    torch.manual_seed(0)
    out = model.generate(**inputs)[:, inputs.input_ids.shape[1] :]
    assert out.max() < VOCAB_SIZE
    assert len(out.unique()) > 100  # top-k 50 at each place would give fewer


def test_without_best_first_the_tokenizer_stays_plain(policy, tmp_path):
    policy.save(tmp_path, best_first=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("abc").input_ids == policy.tokenizer("abc").input_ids
    assert load_saved_policy(tmp_path).reward_tokens == policy.reward_tokens


@pytest.mark.parametrize("wants_bos", [False, True])
def test_a_beginning_of_sequence_token_stays_behind_the_reward_token(tmp_path, wants_bos):
    """Also where the tokenizer's settings ask the library to rebuild its post-processor."""
    base = save_tiny(tmp_path / "base", tiny_llama())
    backend = Tokenizer.from_file(str(base / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A",
        pair="<|endoftext|> $A $B",
        special_tokens=[("<|endoftext|>", EOS_ID)],
    )
    backend.save(str(base / "tokenizer.json"))
    path = base / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}
    if wants_bos:
        settings |= {"add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}
    path.write_text(json.dumps(settings))

    policy = load_policy(ModelConfig(name=str(base)), num_quantiles=3, seed=0)
    plain = policy.tokenizer("abc").input_ids
    assert plain[0] == EOS_ID
    policy.save(tmp_path / "model")
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved("abc").input_ids == [policy.reward_tokens.best, *plain]
    assert load_saved_policy(tmp_path / "model").tokenizer("abc").input_ids == plain
    card = (tmp_path / "model" / "README.md").read_text()
    lowest = "<|reward_0|><|endoftext|>The"
    assert f'tokenizer("{lowest}", add_special_tokens=False' in card
    expected = [policy.reward_tokens.ids[0], *policy.tokenizer("The").input_ids]
    assert saved(lowest, add_special_tokens=False).input_ids == expected


def test_the_folder_says_how_to_switch_the_reward_token_off(policy, tmp_path):
    policy.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "add_special_tokens=False" in card
    record = json.loads((tmp_path / REWARD_TOKENS_FILE).read_text())
    assert record["num_quantiles"] == 5
    assert record["ids"] == list(policy.reward_tokens.ids)
    assert record["texts"] == list(policy.reward_tokens.texts)


def test_saving_leaves_the_policy_as_it_is(policy, tmp_path):
    before = policy.model.generation_config.to_dict()
    policy.save(tmp_path)
    assert policy.model.generation_config.to_dict() == before
    assert policy.tokenizer("abc").input_ids == byte_tokenizer()("abc").input_ids


def test_folders_that_are_not_saved_policies_are_refused(policy, tmp_path):
    with pytest.raises(ModelError, match="no folder"):
        load_saved_policy(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="not saved by quark"):
        load_saved_policy(save_tiny(tmp_path / "plain"))
    policy.save(tmp_path / "model")
    path = tmp_path / "model" / REWARD_TOKENS_FILE
    record = json.loads(path.read_text())
    for damage in ("{", "[]", json.dumps(record | {"format_version": 99})):
        path.write_text(damage)
        with pytest.raises(ModelError, match=REWARD_TOKENS_FILE):
            load_saved_policy(tmp_path / "model")
    for size, reason in ((0, "no rows"), (10**6, "no rows"), (258, "includes reward tokens")):
        path.write_text(json.dumps(record | {"base_vocab_size": size}))
        with pytest.raises(ModelError, match=reason):
            load_saved_policy(tmp_path / "model")
    path.write_text(json.dumps(record | {"ids": [1, 2, 3, 4, 5]}))
    with pytest.raises(ModelError, match="reward tokens it was saved with"):
        load_saved_policy(tmp_path / "model")
