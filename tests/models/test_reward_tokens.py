from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from quark.errors import ModelError
from quark.models.config import ModelConfig
from quark.models.reward_tokens import add_reward_tokens, begin_from_words
from scripts.model_families import small_model
from tests.tiny import VOCAB_SIZE, byte_tokenizer, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("tied", [True, False])
def test_both_matrices_grow_by_k_and_old_rows_stay(make, tied):
    model, old = make(tied=tied), make(tied=tied)
    tokens = add_reward_tokens(model, byte_tokenizer(), 5, seed=3)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.shape == head.shape == (VOCAB_SIZE + 5, 32)
    assert (embedding is head) == tied
    assert torch.equal(embedding[:VOCAB_SIZE], old.get_input_embeddings().weight)
    assert torch.equal(head[:VOCAB_SIZE], old.get_output_embeddings().weight)
    assert model.config.vocab_size == VOCAB_SIZE + 5
    assert tokens.ids == tuple(range(VOCAB_SIZE, VOCAB_SIZE + 5))
    assert tokens.base_vocab_size == VOCAB_SIZE
    assert tokens.best == VOCAB_SIZE + 4


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_follow_the_spread_of_the_old_ones(tied):
    model = tiny_gpt2(tied=tied)
    k = 400
    add_reward_tokens(model, byte_tokenizer(), k, seed=3, std_scale=2.0)
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        old, new = weight[:VOCAB_SIZE], weight[VOCAB_SIZE:]
        assert torch.allclose(new.mean(0), old.mean(0), atol=0.2)
        assert torch.allclose(new.std(0), 2.0 * old.std(0), rtol=0.2)


def test_the_seed_decides_the_new_rows():
    def rows(seed):
        model = tiny_gpt2(tied=False)
        add_reward_tokens(model, byte_tokenizer(), 5, seed=seed)
        return torch.cat(
            [
                model.get_input_embeddings().weight[VOCAB_SIZE:],
                model.get_output_embeddings().weight[VOCAB_SIZE:],
            ]
        )

    assert torch.equal(rows(1), rows(1))
    assert not torch.allclose(rows(1), rows(2))
    # The five tokens can be told apart from the start.
    assert torch.pdist(rows(1)).min() > 0.5


@pytest.mark.parametrize(("rows", "expected"), [(VOCAB_SIZE + 20, VOCAB_SIZE + 20), (259, 262)])
def test_tokens_of_a_padded_matrix_fall_inside_it_and_the_rest_is_not_compared(rows, expected):
    model = tiny_gpt2(vocab=rows, tied=False)
    tokens = add_reward_tokens(model, byte_tokenizer(), 5, seed=0)
    assert tokens.ids == tuple(range(VOCAB_SIZE, VOCAB_SIZE + 5))
    assert tokens.base_vocab_size == VOCAB_SIZE
    assert model.get_input_embeddings().weight.shape[0] == expected
    assert model.get_output_embeddings().weight.shape[0] == expected


def test_each_text_is_one_token_and_vanishes_in_decoding():
    tokenizer = byte_tokenizer()
    tokens = add_reward_tokens(tiny_gpt2(), tokenizer, 3, seed=0)
    ids = tokenizer(f"a{tokens.texts[1]}b").input_ids
    assert ids[1] == tokens.ids[1]
    assert len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_everything_that_a_model_has_for_each_token_is_drawn_by_the_seed():
    """Gemma 3n has a second table, with vectors for each layer."""
    models = [small_model("gemma3n_text") for _ in range(2)]
    for number, model in enumerate(models):
        torch.manual_seed(number)
        add_reward_tokens(model, byte_tokenizer(), 3, seed=7)
    one, other = (dict(model.named_parameters()) for model in models)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    table = one["model.embed_tokens_per_layer.weight"]
    assert table.isfinite().all()
    assert not torch.equal(table[-1], table[-2])


def test_a_family_whose_own_code_cannot_resize_is_refused_with_the_way_on():
    class Stiff(LlamaForCausalLM):
        def _init_weights(self, module):
            raise AttributeError("no attribute 'embeddings'")

    model = tiny_llama()
    model.__class__ = Stiff
    with pytest.raises(
        ModelError, match=r"Stiff cannot resize .*'embeddings'.*reward_tokens = false"
    ):
        add_reward_tokens(model, byte_tokenizer(), 3, seed=0, std_scale=1.0)


def test_a_model_that_has_reward_tokens_is_refused():
    tokenizer = byte_tokenizer()
    add_reward_tokens(tiny_gpt2(), tokenizer, 5, seed=0)
    with pytest.raises(ModelError, match="already has reward tokens"):
        add_reward_tokens(tiny_gpt2(), tokenizer, 3, seed=0)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_begin_from_words_lie_between_them(tied):
    model, tokenizer = tiny_gpt2(tied=tied), byte_tokenizer()
    tokens = add_reward_tokens(model, tokenizer, 5, seed=0)
    head = model.get_output_embeddings().weight.detach().clone()
    begin_from_words(model, tokenizer, tokens, (["ab", "c"], ["xyz"]))
    embedding = model.get_input_embeddings().weight.detach()
    old = embedding[:VOCAB_SIZE]
    length = old.norm(dim=1).mean()

    def meaning(text):
        mean = old[tokenizer(text).input_ids].mean(0)
        return mean * length / mean.norm()

    lowest, best = meaning(" ab c"), meaning(" xyz")
    assert torch.allclose(embedding[tokens.ids[0]], lowest, atol=1e-5)
    assert torch.allclose(embedding[tokens.best], best, atol=1e-5)
    assert torch.allclose(embedding[tokens.ids[1]], 0.75 * lowest + 0.25 * best, atol=1e-5)
    assert torch.equal(old, tiny_gpt2(tied=tied).get_input_embeddings().weight)
    if not tied:
        assert torch.equal(model.get_output_embeddings().weight, head)


def test_words_that_say_nothing_are_refused():
    model, tokenizer = tiny_gpt2(), byte_tokenizer()
    tokens = add_reward_tokens(model, tokenizer, 3, seed=0)
    with pytest.raises(ModelError, match="mean the same"):
        begin_from_words(model, tokenizer, tokens, (["a"], ["a"]))
    with pytest.raises(ValueError, match="belong together"):
        ModelConfig(lowest_words=("bad",))
