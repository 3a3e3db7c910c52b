from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from quark.data.collate import collate
from quark.errors import ModelError
from quark.generation.base import SamplingConfig
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.logprobs import token_nll
from quark.models.policy import Policy
from quark.models.reward_tokens import add_reward_tokens
from quark.models.token_critic import TokenCritic
from quark.types import FinishReason, Prompt
from tests.tiny import (
    EOS,
    EOS_ID,
    VOCAB_SIZE,
    byte_tokenizer,
    padded,
    tiny_gpt2,
    tiny_llama,
    tiny_policy,
)

MAKERS = {
    "gpt2 tied": tiny_gpt2,
    "gpt2 untied": lambda: tiny_gpt2(tied=False),
    "llama tied": tiny_llama,
    "llama untied": lambda: tiny_llama(tied=False),
}
PROMPTS = [
    Prompt(index=i, text="", token_ids=tuple(range(10, 11 + (i * 7) % 5))) for i in range(24)
]
CPU = torch.device("cpu")


@pytest.fixture(params=MAKERS)
def policy(request):
    return tiny_policy(likely_eos(MAKERS[request.param]()))


def likely_eos(model):
    """Make the end of sequence likely enough that completions have many lengths."""
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS_ID] *= 2.0
    return model


def generator(policy, **settings):
    config = SamplingConfig(**({"max_new_tokens": 8, "batch_size": 7} | settings))
    return TransformersGenerator(policy, policy.tokenizer, policy.reward_tokens, config, CPU)


def ids(completions):
    return [completion.token_ids.tolist() for completion in completions]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}, {"guidance": 1.5}]
)
@pytest.mark.parametrize("quantile", [0, 4])
def test_logprobs_of_sampled_tokens_equal_those_of_training(policy, settings, quantile):
    sampled = generator(policy, **settings).generate(PROMPTS, quantile=quantile, seed=5)
    samples = padded(
        [c.prompt.token_ids for c in sampled],
        [c.token_ids.astype(int).tolist() for c in sampled],
        [quantile] * len(sampled),
        extra=2,
    )
    batch = collate(samples, policy.reward_tokens.ids, policy.pad_id, CPU)
    nll = token_nll(
        policy.completion_rows(batch),
        batch.targets,
        base_vocab_size=policy.reward_tokens.base_vocab_size,
    )
    trained = -batch.sum_by_sequence(nll)
    found = torch.tensor([c.logprob_policy for c in sampled])
    assert torch.allclose(found, trained, atol=1e-4)


CHANGED = {
    "warm": {"temperature": 1.7},
    "top-k": {"top_k": 20},
    "nucleus": {"top_p": 0.7},
    "waits": {"min_new_tokens": 3},
    "guided": {"guidance": 1.5},
    "guided closely": {"guidance": 3.0, "guidance_floor": 0.1},
    "by the critic": {"guide": "critic", "guidance": 2.0},
    "by the critic, changed": {
        "guide": "critic",
        "guidance": 0.7,
        "temperature": 1.3,
        "top_p": 0.8,
        "min_new_tokens": 2,
    },
    "all": {
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.9,
        "min_new_tokens": 2,
        "guidance": 0.7,
        "guidance_floor": 0.01,
    },
}
"""Settings under which completions are drawn from something else than the policy."""


CRITIC = TokenCritic(
    scores=np.random.default_rng(0).normal(size=VOCAB_SIZE).astype(np.float32),
    explained=0.5,
    num_samples=9,
)


def naive_distribution(policy, config, quantile, tokens, num_sampled):
    """float64 [W] what the next token is drawn from, by the words of the settings; no code of the sampler's."""
    width = policy.reward_tokens.base_vocab_size

    def log_p(token):
        row = torch.tensor([[policy.reward_tokens.ids[token], *tokens]])
        with torch.no_grad():
            return F.log_softmax(policy.model(row).logits[0, -1, :width].double(), -1).numpy()

    logits = log_p(quantile)
    if num_sampled < config.min_new_tokens:
        logits[EOS_ID] = -np.inf
    if config.guide == "critic":
        share = {0: -1.0, 4: 1.0}[quantile]
        logits = logits + config.guidance * share * CRITIC.scores.astype(float)
    elif config.guidance and quantile > 0:
        plausible = logits >= logits.max() + np.log(config.guidance_floor)
        logits = (1 + config.guidance) * logits - config.guidance * log_p(0)
        logits[~plausible] = -np.inf
    q = np.exp((logits - logits.max()) / config.temperature)
    q /= q.sum()
    order = np.argsort(-q, kind="stable")
    if config.top_k:
        q[order[config.top_k :]] = 0.0
        q /= q.sum()
    before = np.cumsum(q[order]) - q[order]
    q[order[before >= config.top_p]] = 0.0
    return q / q.sum()


@pytest.mark.parametrize("settings", CHANGED.values(), ids=CHANGED)
@pytest.mark.parametrize("quantile", [0, 4])
def test_logprobs_as_drawn_are_those_of_the_distribution_that_was_asked_for(settings, quantile):
    policy = tiny_policy(likely_eos(likely_eos(tiny_llama())))
    policy.critics.critic = CRITIC
    config = SamplingConfig(max_new_tokens=8, **settings)
    sampled = generator(policy, **settings).generate(PROMPTS[:10], quantile=quantile, seed=5)
    assert len({len(c.token_ids) for c in sampled}) > 1
    for completion in sampled:
        tokens, expected = list(completion.prompt.token_ids), 0.0
        for number, token in enumerate(completion.token_ids.tolist()):
            q = naive_distribution(policy, config, quantile, tokens, number)
            expected += np.log(q[token])
            tokens.append(token)
        assert completion.logprob_sampled == pytest.approx(expected, abs=1e-4)
    differs = [abs(c.logprob_sampled - c.logprob_policy) > 1e-3 for c in sampled]
    # Guiding the worst token away from itself is no guidance.
    assert any(differs) != (quantile == 0 and set(settings) <= {"guidance", "guidance_floor"})


@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0}])
@pytest.mark.parametrize("quantile", [None, 0, 4])
def test_plain_sampling_has_one_logprob_to_the_last_bit(policy, settings, quantile):
    sampled = generator(policy, **settings).generate(PROMPTS, quantile=quantile, seed=5)
    is_guided = bool(settings) and quantile == 4
    assert all(c.logprob_sampled == c.logprob_policy for c in sampled) != is_guided


def test_without_a_critic_or_a_token_there_is_nothing_to_guide_by():
    policy = tiny_policy()
    asked = {"guide": "critic", "guidance": 3.0}
    plain = ids(generator(policy).generate(PROMPTS, quantile=4, seed=5))
    assert ids(generator(policy, **asked).generate(PROMPTS, quantile=4, seed=5)) == plain
    untouched = ids(generator(policy).generate(PROMPTS, quantile=None, seed=5))
    policy.critics.critic = CRITIC
    assert ids(generator(policy, **asked).generate(PROMPTS, quantile=4, seed=5)) != plain
    assert ids(generator(policy, **asked).generate(PROMPTS, quantile=None, seed=5)) == untouched


def test_greedy_completions_are_certain(policy):
    for settings in ({}, {"guidance": 2.0, "min_new_tokens": 2}):
        sampled = generator(policy, temperature=0.0, **settings).generate(
            PROMPTS, quantile=4, seed=0
        )
        assert {c.logprob_sampled for c in sampled} == {0.0}
        assert all(c.logprob_policy < 0.0 for c in sampled)


def policy_of_two_words():
    """Of the tokens a, b and the end, with two reward tokens."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, EOS: 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    model = tiny_llama(vocab=3)
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    return Policy(model, tokenizer, add_reward_tokens(model, tokenizer, 2, seed=0))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0},
        {"top_k": 2},
        {"min_new_tokens": 2},
        {"guidance": 0.5, "guidance_floor": 1e-6},
        {"guidance": 1.0, "guidance_floor": 0.05, "temperature": 2.0, "top_p": 0.95},
    ],
)
def test_all_completions_of_two_words_have_together_the_probability_1(settings):
    policy = policy_of_two_words()
    prompt = Prompt(index=0, text="a b", token_ids=(0, 1))
    sampled = generator(policy, max_new_tokens=3, batch_size=4000, **settings).generate(
        [prompt] * 8_000, quantile=1, seed=0
    )
    q = {tuple(c.token_ids.tolist()): np.exp(c.logprob_sampled) for c in sampled}
    # The rows of one batch may differ in rounding.
    assert (
        max(abs(q[tuple(c.token_ids.tolist())] - np.exp(c.logprob_sampled)) for c in sampled) < 1e-6
    )
    assert len(q) > 3
    # 8,000 draws leave out rare ones alone.
    assert 1.0 - 3e-3 < sum(q.values()) < 1.0 + 1e-6
    counts = Counter(tuple(c.token_ids.tolist()) for c in sampled)
    for completion, probability in q.items():
        deviation = np.sqrt(probability * (1 - probability) / len(sampled))
        assert abs(counts[completion] / len(sampled) - probability) < 5 * deviation + 1e-9


def test_completions_end_with_eos_or_at_the_limit_and_keep_the_order(policy):
    prompts = PROMPTS * 30
    sampled = generator(policy, temperature=2.0).generate(prompts, quantile=4, seed=1)
    assert [c.prompt for c in sampled] == prompts
    reasons = {c.finish_reason for c in sampled}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    for c in sampled:
        tokens = c.token_ids.tolist()
        assert c.token_ids.dtype == np.uint32
        assert EOS_ID not in tokens[:-1]
        assert (tokens[-1] == EOS_ID) == (c.finish_reason is FinishReason.STOP)
        assert len(tokens) == 8 or c.finish_reason is FinishReason.STOP
        assert c.text == policy.tokenizer.decode(tokens, skip_special_tokens=True)
        assert (c.reward_quantile, c.seed) == (4, 1)
        assert np.isnan(c.logprob_reference)


@pytest.mark.parametrize("floor", [0.001, 0.2])
def test_guided_frequencies_follow_the_formula(floor):
    policy = tiny_policy(tiny_llama())
    draws = 8000
    settings = {"max_new_tokens": 1, "guidance": 2.0, "guidance_floor": floor, "batch_size": 4000}
    sampled = generator(policy, **settings).generate([PROMPTS[0]] * draws, quantile=4, seed=1)
    counts = np.bincount([int(c.token_ids[0]) for c in sampled], minlength=VOCAB_SIZE)
    best, worst = probabilities(policy, 4), probabilities(policy, 0)
    expected = np.where(best < floor * best.max(), 0.0, best**3 / worst**2)
    expected /= expected.sum()
    assert counts[expected == 0].sum() == 0
    error = np.abs(counts / draws - expected).sum()
    assert error < 2.0 * np.sqrt(expected * (1 - expected) / draws).sum()
    assert error < 0.2 * np.abs(expected - best).sum()


def test_guided_completions_do_not_depend_on_the_batch_either():
    policy = tiny_policy(likely_eos(tiny_llama()))
    alone, together = (
        generator(policy, guidance=2.0, batch_size=size).generate(PROMPTS, quantile=4, seed=3)
        for size in (1, 24)
    )
    assert ids(alone) == ids(together)
    assert len({len(row) for row in ids(alone)}) > 1, "rows leave the batch at different steps"


def test_only_a_token_above_the_worst_is_guided(policy):
    for quantile in (0, None):
        plain, guided_ = (
            ids(generator(policy, guidance=g).generate(PROMPTS, quantile=quantile, seed=3))
            for g in (0.0, 5.0)
        )
        assert plain == guided_


def test_guidance_leaves_something_to_sample_where_the_end_is_forbidden():
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS_ID] *= 50.0
    policy = tiny_policy(model)
    settings = {"guidance": 3.0, "guidance_floor": 1.0, "min_new_tokens": 8}
    sampled = generator(policy, **settings).generate(PROMPTS, quantile=4, seed=0)
    assert all(len(c.token_ids) == 8 for c in sampled)


def test_the_same_seed_gives_the_same_completions_whatever_the_batch_size(policy):
    expected = ids(generator(policy).generate(PROMPTS, quantile=2, seed=9))
    assert ids(generator(policy).generate(PROMPTS, quantile=2, seed=9)) == expected
    for batch_size in (1, 5, 64):
        again = generator(policy, batch_size=batch_size)
        assert ids(again.generate(PROMPTS, quantile=2, seed=9)) == expected
    assert ids(generator(policy).generate(PROMPTS, quantile=2, seed=10)) != expected


def test_sampling_touches_no_global_generator(policy):
    before = torch.get_rng_state()
    generator(policy).generate(PROMPTS, quantile=2, seed=9)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}])
def test_reward_tokens_are_never_sampled_however_likely(policy, settings):
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[VOCAB_SIZE:] *= 100.0
    for quantile in (None, 0, 4):
        sampled = generator(policy, **settings).generate(PROMPTS, quantile=quantile, seed=3)
        assert max(max(tokens) for tokens in ids(sampled)) < VOCAB_SIZE


def test_columns_that_the_tokenizer_lacks_are_never_sampled():
    model = tiny_gpt2(vocab=VOCAB_SIZE + 30, tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB_SIZE:] *= 100.0
    plain = TransformersGenerator(model, byte_tokenizer(), None, SamplingConfig(), CPU)
    sampled = plain.generate(PROMPTS, quantile=None, seed=0)
    assert max(max(tokens) for tokens in ids(sampled)) < VOCAB_SIZE


def test_a_plain_model_samples_without_a_token_and_has_no_quantiles():
    plain = TransformersGenerator(tiny_gpt2(), byte_tokenizer(), None, SamplingConfig(), CPU)
    assert all(c.reward_quantile is None for c in plain.generate(PROMPTS, quantile=None, seed=0))
    with pytest.raises(ValueError, match="no reward tokens"):
        plain.generate(PROMPTS, quantile=0, seed=0)


def test_greedy_equals_the_library_s_own(policy):
    sampled = generator(policy, temperature=0.0).generate(PROMPTS, quantile=4, seed=0)
    for completion in sampled[:6]:
        row = torch.tensor([[policy.reward_tokens.best, *completion.prompt.token_ids]])
        expected = policy.model.generate(
            row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=EOS_ID,
            pad_token_id=EOS_ID,
            suppress_tokens=list(policy.reward_tokens.ids),
        )
        assert completion.token_ids.tolist() == expected[0, row.shape[1] :].tolist()


def probabilities(policy, quantile):
    row = torch.tensor([[policy.reward_tokens.ids[quantile], *PROMPTS[0].token_ids]])
    with torch.no_grad():
        return F.softmax(policy.model(row).logits[0, -1, :VOCAB_SIZE], -1).double().numpy()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 2.0}, {"top_p": 0.6}, {"top_k": 5}, {"top_k": 8, "top_p": 0.7}],
)
def test_frequencies_follow_the_distribution_that_was_asked_for(settings):
    policy = tiny_policy()
    draws = 20_000
    sampled = generator(policy, max_new_tokens=1, batch_size=4000, **settings).generate(
        [PROMPTS[0]] * draws, quantile=3, seed=0
    )
    counts = np.bincount([c.token_ids[0] for c in sampled], minlength=VOCAB_SIZE)
    p = probabilities(policy, 3)
    p = p ** (1 / settings.get("temperature", 1.0))
    p /= p.sum()
    order = np.argsort(-p)
    if "top_k" in settings:
        p[order[settings["top_k"] :]] = 0.0
        p /= p.sum()
    if "top_p" in settings:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= settings["top_p"]]] = 0.0
        p /= p.sum()
    assert counts[p == 0.0].sum() == 0
    likely = p * draws >= 10
    expected = p[likely] * draws
    z = (counts[likely] - expected) / np.sqrt(expected * (1 - p[likely]) + 1e-9)
    assert np.abs(z[p[likely] < 1]).max() < 4.5


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-60])
def test_the_coldest_sampling_is_greedy(temperature):
    policy = tiny_policy()
    greedy, cold = (
        ids(
            generator(policy, temperature=t, min_new_tokens=1).generate(PROMPTS, quantile=1, seed=1)
        )
        for t in (0.0, temperature)
    )
    assert cold == greedy


def test_eos_waits_for_the_minimum_length(policy):
    sampled = generator(policy, min_new_tokens=3).generate(PROMPTS, quantile=4, seed=1)
    assert all(len(tokens) >= 3 for tokens in ids(sampled))
    assert all(EOS_ID not in tokens[:3] for tokens in ids(sampled))


def test_a_training_model_is_put_back_into_training(policy):
    policy.model.train()
    policy.model.config.attn_pdrop = 0.5
    first = ids(generator(policy).generate(PROMPTS, quantile=4, seed=1))
    assert policy.model.training
    policy.model.eval()
    assert ids(generator(policy).generate(PROMPTS, quantile=4, seed=1)) == first


def test_what_cannot_be_generated_is_refused_by_name(policy):
    one = generator(policy)
    with pytest.raises(ValueError, match="prompt 3 has no tokens"):
        one.generate([Prompt(index=3, text="", token_ids=())], quantile=0, seed=0)
    token = policy.reward_tokens.best
    with pytest.raises(ValueError, match="outside the base vocabulary"):
        one.generate([Prompt(index=3, text="", token_ids=(token,))], quantile=0, seed=0)
    with pytest.raises(ValueError, match="quantile 5"):
        one.generate(PROMPTS, quantile=5, seed=0)
    with pytest.raises(ModelError, match="positions"):
        one.generate([Prompt(index=0, text="", token_ids=(1,) * 60)], quantile=0, seed=0)
    assert one.generate([], quantile=0, seed=0) == []


def test_a_broken_model_is_reported():
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        generator(policy).generate(PROMPTS, quantile=0, seed=0)


def test_a_completion_keeps_the_space_that_decoding_alone_would_drop():
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "▁c": 2, "</s>": 3}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.decode([1]) == "b"
    config = SamplingConfig(max_new_tokens=3)
    plain = TransformersGenerator(tiny_gpt2(vocab=4), tokenizer, None, config, CPU)
    prompts = [Prompt(index=i, text="a b", token_ids=(0, 1)) for i in range(20)]
    for completion in plain.generate(prompts, quantile=None, seed=0):
        whole = tokenizer.decode([0, 1, *completion.token_ids], skip_special_tokens=True)
        assert completion.prompt.text + completion.text == whole


@pytest.mark.parametrize("settings", [{}, {"guidance": 1.5}])
def test_every_step_after_the_prompt_runs_one_column(policy, settings):
    widths = []
    embedding = policy.model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    try:
        generator(policy, min_new_tokens=4, **settings).generate(PROMPTS[:7], quantile=1, seed=0)
    finally:
        hook.remove()
    assert widths[0] > 1
    assert len(widths) >= 4
    assert set(widths[1:]) == {1}
