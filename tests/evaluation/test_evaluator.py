from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from quark.evaluation.evaluator import Evaluation, Evaluator
from quark.generation.base import SamplingConfig
from quark.generation.transformers_generator import TransformersGenerator
from quark.reference.base import FrozenReference
from quark.rewards.base import RewardFunction
from quark.types import Prompt
from tests.tiny import tiny_gpt2, tiny_policy

PROMPTS = [
    Prompt(index=i, text=text, token_ids=tuple(tiny_policy().tokenizer.encode(text)))
    for i, text in enumerate(("one", "seven", "to"))
]


class Length:
    name = "length"

    def __call__(self, *, prompts: Sequence[str], completions: Sequence[str]) -> list[float | None]:
        return [
            None if p == "to" else float(len(c)) for p, c in zip(prompts, completions, strict=True)
        ]


class Huge(Length):
    def __call__(self, *, prompts: Sequence[str], completions: Sequence[str]) -> list[float | None]:
        return [3e38] * len(completions)


class Hesitant(Length):
    """Fails the first time."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, *, prompts: Sequence[str], completions: Sequence[str]) -> list[float | None]:
        self.num_calls += 1
        if self.num_calls == 1:
            raise OSError("busy")
        return super().__call__(prompts=prompts, completions=completions)


def evaluate(
    quantile: int | None,
    *,
    batch_size: int = 4,
    reward: RewardFunction | None = None,
    judge: RewardFunction | None = None,
    retries: int = 0,
) -> Evaluation:
    policy = tiny_policy()
    reference = FrozenReference(tiny_gpt2())
    sampling = SamplingConfig(max_new_tokens=5)
    evaluator = Evaluator(
        prompts=PROMPTS,
        reference=reference,
        reward=reward or Length(),
        judges={"again": judge or Length()},
        retries=retries,
        completions_per_prompt=2,
        batch_size=batch_size,
        seed=1,
    )
    generator = TransformersGenerator(
        policy if quantile is not None else reference.model,
        policy.tokenizer,
        policy.reward_tokens,
        sampling,
        torch.device("cpu"),
    )
    return evaluator.evaluate(generator, policy, quantile=quantile)


def test_the_original_model_is_at_no_distance_from_itself() -> None:
    evaluation = evaluate(None)
    assert evaluation.metrics["kl_reference_to_policy"] == 0.0
    assert evaluation.metrics["kl_policy_to_reference"] == 0.0


def test_perplexity_is_that_of_the_tokens_the_reference_sampled() -> None:
    evaluation = evaluate(None)
    nll = -sum(c.logprob_policy for c in evaluation.completions)
    num_tokens = sum(len(c.token_ids) for c in evaluation.completions)
    assert evaluation.metrics["perplexity_reference"] == pytest.approx(
        math.exp(nll / num_tokens), rel=1e-4
    )


def test_figures_do_not_depend_on_the_batch_size() -> None:
    small, large = evaluate(2, batch_size=1), evaluate(2, batch_size=64)
    assert small.metrics == pytest.approx(large.metrics, rel=1e-4, nan_ok=True)
    assert small.metrics["kl_reference_to_policy"] > 0
    assert small.metrics["kl_policy_to_reference"] > 0


def test_completions_without_a_score_are_counted_and_left_out_of_the_mean() -> None:
    evaluation = evaluate(1)
    scored = [len(c.text) for c in evaluation.completions if c.prompt.text != "to"]
    assert evaluation.metrics["failed_scores"] == 2
    said, of_the_judge = evaluation.failures
    assert said.startswith("2 of ")
    assert "returned None" in said
    assert "the judge again" in of_the_judge
    assert evaluation.metrics["reward_mean"] == pytest.approx(sum(scored) / 4)
    assert evaluation.judges["again"] == evaluation.metrics["reward_mean"]


def test_a_judge_is_asked_again_as_the_reward_is() -> None:
    evaluation = evaluate(1, judge=Hesitant(), retries=1)
    assert evaluation.judges["again"] == evaluation.metrics["reward_mean"]


def test_the_mean_of_large_scores_is_no_infinity() -> None:
    metrics = evaluate(None, reward=Huge()).metrics
    assert metrics["reward_mean"] == pytest.approx(3e38)
    assert metrics["reward_std"] == 0.0


def test_all_completions_of_a_prompt_stand_together() -> None:
    texts = [c.prompt.text for c in evaluate(0).completions]
    assert texts == ["one", "one", "seven", "seven", "to", "to"]
