"""What the tokens tell apart, against versions that take one sample and one token at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from quark.evaluation.information import (
    Information,
    LabelledSamples,
    completion_logprobs,
    contrast_losses,
    drift_per_token,
    information_of_each,
    interval_over_groups,
    rank_correlation,
)
from quark.models.policy import Policy
from quark.pool.base import PromptRecord
from quark.pool.memory import MemoryPool
from quark.reference.base import FrozenReference
from quark.selftest.samples import make_batch
from tests.tiny import COMPLETIONS, PROMPTS, VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_policy


@pytest.fixture(scope="module")
def samples() -> LabelledSamples:
    pool = MemoryPool(vocab_size=VOCAB_SIZE)
    prompts = [PromptRecord(token_ids=np.array(ids, np.uint32), text="") for ids in PROMPTS]
    pool.append(
        replace(
            make_batch("run/0/0", {"reward": [0.3, -1.0, 2.5, 0.0, 1.5, 1.0]}),
            prompts=prompts,
            prompt_index=np.arange(len(prompts), dtype=np.uint32),
            completion_tokens=np.concatenate(COMPLETIONS).astype(np.uint32),
            completion_offsets=np.cumsum([0, *map(len, COMPLETIONS)], dtype=np.int64),
        )
    )
    # An order of their own, and not all of them.
    ids = np.array([4, 2, 5, 0, 1], dtype=np.uint64)
    quantization = pool.quantize(3)
    return LabelledSamples(
        pool=pool,
        ids=ids,
        labels=quantization.labels_of(ids),
        rewards=pool.scores("reward")[ids.astype(np.int64)],
    )


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_log_probabilities_are_those_of_each_sample_alone(
    samples: LabelledSamples, size: int, make: type
) -> None:
    policy = tiny_policy(make(), num_quantiles=3)
    found = completion_logprobs(policy, samples, batch_size=size)
    expected = [
        [
            _log_p(policy, sample.prompt_tokens, sample.completion_tokens, token)
            for token in policy.reward_tokens.ids
        ]
        for sample in samples.pool.samples(samples.ids.tolist())
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def _log_p(policy: Policy, prompt: np.ndarray, completion: np.ndarray, token: int) -> float:
    ids = torch.tensor([[token, *prompt.tolist(), *completion.tolist()]])
    with torch.no_grad():
        logits = policy.model(ids).logits[0, len(prompt) : -1]
    log_p = F.log_softmax(logits[:, : policy.reward_tokens.base_vocab_size], -1)
    return float(log_p.gather(1, torch.tensor(completion.astype(np.int64))[:, None]).sum())


def test_no_samples_have_no_log_probabilities(samples: LabelledSamples) -> None:
    none = LabelledSamples(
        pool=samples.pool,
        ids=samples.ids[:0],
        labels=samples.labels[:0],
        rewards=samples.rewards[:0],
    )
    assert completion_logprobs(tiny_policy(num_quantiles=3), none, batch_size=4).shape == (0, 3)


def test_a_policy_like_its_reference_has_not_drifted(samples: LabelledSamples) -> None:
    policy = tiny_policy(tiny_llama(), num_quantiles=3)
    reference = FrozenReference(tiny_llama())
    drift = drift_per_token(policy, reference, samples, batch_size=2)
    # The reward token before the prompt is all that is different.
    assert drift > 0.0
    assert drift == pytest.approx(
        drift_per_token(policy, reference, samples, batch_size=5), rel=1e-4
    )


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.floats(-300, 0), min_size=3, max_size=3),
            st.integers(0, 2),
            st.floats(-5, 5),
        ),
        min_size=2,
        max_size=20,
    ),
    temperature=st.sampled_from([0.5, 1.0, 7.0]),
)
def test_the_figures_are_those_of_the_posterior(
    rows: list[tuple[list[float], int, float]], temperature: float
) -> None:
    logprobs = np.array([row[0] for row in rows])
    labels = np.array([row[1] for row in rows], dtype=np.int16)
    rewards = np.array([row[2] for row in rows], dtype=np.float32)
    found = Information.of(logprobs, labels, rewards, temperature=temperature)
    posterior = torch.softmax(torch.from_numpy(logprobs) / temperature, dim=1)
    losses = -torch.log(posterior).numpy()[np.arange(len(rows)), labels]
    is_clear = np.isfinite(losses)
    np.testing.assert_allclose(
        contrast_losses(logprobs, labels, temperature=temperature)[is_clear],
        losses[is_clear],
        atol=1e-9,
    )
    assert found.information == pytest.approx(math.log(3) - found.contrast_loss)
    assert found.num_samples == len(rows)
    assert 0.0 <= found.label_accuracy <= 1.0
    assert math.isnan(found.rank_correlation) or -1.0001 <= found.rank_correlation <= 1.0001


def test_tokens_that_say_nothing_have_no_information() -> None:
    logprobs = np.full((4, 5), -12.5)
    found = Information.of(
        logprobs, np.array([0, 1, 2, 3], np.int16), np.arange(4, dtype=np.float32)
    )
    assert found.information == pytest.approx(0.0)
    assert found.error == pytest.approx(0.0)
    assert math.isnan(found.rank_correlation)


def test_tokens_that_say_all_have_log_k() -> None:
    labels = np.array([0, 1, 2], np.int16)
    logprobs = np.where(np.eye(3) > 0, -1.0, -500.0)
    found = Information.of(logprobs, labels, np.array([1.0, 2.0, 3.0], np.float32))
    assert found.information == pytest.approx(math.log(3))
    assert found.label_accuracy == 1.0
    assert found.rank_correlation == pytest.approx(1.0)


def test_one_sample_has_no_standard_error() -> None:
    found = Information.of(np.zeros((1, 2)), np.zeros(1, np.int16), np.zeros(1, np.float32))
    assert math.isnan(found.error)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 400], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 1, 2, 2], [1, 2, 1, 2], 0.0),
        ([1, 2, 3, 4], [1, 1, 1, 5], 0.7745966692414834),  # as scipy.stats.spearmanr says
        ([1, 2], [5, 5], math.nan),
        ([], [], math.nan),
    ],
)
def test_rank_correlation_shares_ranks_among_equals(
    first: list[float], second: list[float], expected: float
) -> None:
    found = rank_correlation(np.array(first, np.float64), np.array(second, np.float32))
    assert found == pytest.approx(expected, nan_ok=True)


def test_tokens_that_do_not_differ_say_exactly_nothing() -> None:
    """Else a model that has learned nothing would tell a millionth of a billionth of a nat with certainty."""
    one = np.random.default_rng(3).normal(-40.0, 10.0, (57, 1))
    labels = np.arange(57, dtype=np.int16) % 5
    found = Information.of(one.repeat(5, axis=1), labels, np.arange(57, dtype=np.float32))
    assert found.information == found.error == 0.0
    assert found.contrast_loss == math.log(5)
    gains = information_of_each(one.repeat(5, axis=1), labels)
    assert interval_over_groups(gains, np.arange(57)).low == 0.0
