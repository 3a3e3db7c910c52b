from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from quark.evaluation.evaluator import Evaluation, Evaluator
from quark.evaluation.metrics import DIRECTIONS, is_better
from quark.generation.base import SamplingConfig
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.token_critic import TokenCritic
from quark.reference.base import FrozenReference
from quark.rewards.base import RewardFunction
from quark.types import Prompt
from tests.tiny import EOS_ID, VOCAB_SIZE, tiny_gpt2, tiny_policy

PROMPTS = [
    Prompt(index=i, text=text, token_ids=tuple(tiny_policy().tokenizer.encode(text)))
    for i, text in enumerate(("one", "seven", "to"))
]


CRITIC = TokenCritic(
    scores=np.random.default_rng(0).normal(size=VOCAB_SIZE).astype(np.float32),
    explained=0.5,
    num_samples=9,
)


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
    **settings: float,
) -> Evaluation:
    policy = tiny_policy()
    policy.critics.critic = CRITIC
    reference = FrozenReference(tiny_gpt2())
    sampling = SamplingConfig(max_new_tokens=5, batch_size=batch_size, **settings)
    evaluator = Evaluator(
        prompts=PROMPTS,
        reference=reference,
        reward=reward or Length(),
        judges={"again": judge or Length()},
        retries=retries,
        completions_per_prompt=2,
        sampling=sampling,
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


def test_every_metric_of_an_evaluation_says_which_way_is_better() -> None:
    assert evaluate(2).metrics.keys() == DIRECTIONS.keys()


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


def test_without_guidance_and_truncation_the_drift_is_the_policy_s_own() -> None:
    metrics = evaluate(3).metrics
    assert metrics["kl_policy_to_reference"] > 0
    assert metrics["kl_sampled_to_reference"] == pytest.approx(metrics["kl_policy_to_reference"])
    num_completions = 2 * len(PROMPTS)
    assert evaluate(3).drifts.shape == (num_completions,)
    num_tokens = metrics["completion_length_mean"] * num_completions
    assert metrics["kl_sampled_per_completion"] == pytest.approx(
        metrics["kl_sampled_to_reference"] * num_tokens / num_completions
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 1.5},
        {"guidance": 0.5, "guidance_floor": 0.2, "min_new_tokens": 2},
        {"temperature": 0.5},
        {"temperature": 0.0},
        {"top_p": 0.6},
        {"top_k": 7, "temperature": 1.3, "guidance": 1.0},
        {"guide": "critic", "guidance": 2.0},
        {"guide": "critic", "guidance": 0.5, "top_p": 0.8, "min_new_tokens": 2},
    ],
)
@pytest.mark.parametrize("quantile", [None, 0, 4])
def test_the_drift_is_that_of_the_distribution_which_is_sampled(
    quantile: int | None, settings: dict[str, float]
) -> None:
    evaluation = evaluate(quantile, **settings)
    drift, num_tokens = 0.0, 0
    for completion in evaluation.completions:
        prompt, tokens = list(completion.prompt.token_ids), completion.token_ids.tolist()
        for step in range(len(tokens)):
            drift += divergence_of_a_step(prompt + tokens[:step], step, quantile, settings)
        num_tokens += len(tokens)
    found = evaluation.metrics["kl_sampled_to_reference"]
    assert found == pytest.approx(drift / num_tokens, rel=1e-4, abs=1e-6)
    if quantile == 4 and settings.get("guidance"):
        assert found > evaluation.metrics["kl_policy_to_reference"]


def divergence_of_a_step(
    ids: list[int], step: int, quantile: int | None, settings: dict[str, float]
) -> float:
    """KL(q || p0) of one token's distribution, from the definition of q token by token."""
    policy, reference = tiny_policy(), tiny_gpt2()
    width = policy.reward_tokens.base_vocab_size

    def logits(model: object, first: list[int]) -> list[float]:
        with torch.no_grad():
            row = model(torch.tensor([first + ids])).logits[0, -1, :width]  # type: ignore[operator]
        return [float(x) for x in row]

    original = logits(reference, [])
    own = list(original)
    if quantile is not None:
        own = logits(policy.model, [policy.reward_tokens.ids[quantile]])
    if step < settings.get("min_new_tokens", 0):
        own[EOS_ID] = -math.inf
    guidance = settings.get("guidance", 0.0)
    if settings.get("guide") == "critic":
        if quantile is not None:
            strength = {0: -guidance, 4: guidance}[quantile]
            own = [x + strength * float(s) for x, s in zip(own, CRITIC.scores, strict=True)]
    elif guidance and quantile:
        worst = logits(policy.model, [policy.reward_tokens.ids[0]])
        least = max(own) + math.log(settings.get("guidance_floor", 0.001))
        own = [
            x + guidance * (x - y) if x >= least else -math.inf
            for x, y in zip(own, worst, strict=True)
        ]
    temperature = settings.get("temperature", 1.0)
    top = max(own)
    if temperature == 0.0:
        weights = [float(x == top) for x in own]
    else:
        weights = [math.exp((x - top) / temperature) for x in own]
    order = sorted(range(width), key=lambda i: -weights[i])
    if settings.get("top_k"):
        order = order[: int(settings["top_k"])]
    if settings.get("top_p"):
        mass, kept = sum(weights), 0.0
        for number, i in enumerate(order):
            kept += weights[i]
            if kept >= settings["top_p"] * mass:
                order = order[: number + 1]
                break
    total = sum(weights[i] for i in order)
    log_sum = max(original) + math.log(sum(math.exp(x - max(original)) for x in original))
    return sum(
        weights[i] / total * (math.log(weights[i] / total) - (original[i] - log_sum))
        for i in order
        if weights[i] > 0
    )


@pytest.mark.parametrize(
    ("name", "before", "after", "expected"),
    [
        ("reward_mean", 0.4, 0.5, True),
        ("reward_mean", 0.5, 0.4, False),
        ("kl_sampled_per_completion", 1.0, 2.0, False),
        ("perplexity_reference", 30.0, 20.0, True),
        ("completion_length_mean", 8.0, 9.0, None),
        ("reward_mean", 0.5, 0.5, None),
        ("reward_mean", math.nan, 0.5, None),
        ("reward_mean", 0.5, math.inf, None),
    ],
)
def test_a_change_is_better_in_the_direction_of_its_metric(
    name: str, before: float, after: float, expected: bool | None
) -> None:
    assert is_better(name, before, after) is expected
