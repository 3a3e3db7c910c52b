"""Sampling by a server: real tokens over a real socket, and every way in which they can be wrong."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from quark.errors import ModelError
from quark.generation.base import SamplingConfig
from quark.generation.completion_server import CompletionServer
from quark.generation.http_generator import HttpGenerator, row_seeds
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.policy import Policy
from quark.types import FinishReason, Prompt
from tests.generation.sampling_server import SamplingServer, serving
from tests.tiny import EOS_ID, VOCAB_SIZE, tiny_llama, tiny_policy

PROMPTS = [
    Prompt(index=10 + i, text="", token_ids=tuple(range(10, 11 + (i * 7) % 5))) for i in range(8)
]
CPU = torch.device("cpu")
KEY = "s3cret-key"
ENDS = list(range(200, EOS_ID + 1))


def make_policy() -> Policy:
    """Ends often enough that completions have many lengths."""
    model = tiny_llama()
    model.generation_config.eos_token_id = ENDS
    return tiny_policy(model)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy()


@pytest.fixture(scope="module")
def folder(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / 'a "folder"'
    policy.save(path, best_first=False)
    return path


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[SamplingServer, dict[str, Any]]]:
    with serving() as pair:
        yield pair


Make = Callable[..., HttpGenerator]


@pytest.fixture
def make(
    policy: Policy, folder: Path, served: tuple[SamplingServer, dict[str, Any]]
) -> Iterator[Make]:
    state, address = served
    state.faults.clear()
    state.requests.clear()
    servers = []

    def made(*, model: Policy = policy, http: dict[str, Any] | None = None, **sampling: Any) -> Any:
        settings = {"max_new_tokens": 6, "batch_size": 3, "backend": "http"}
        config = SamplingConfig(**settings | {"http": address | (http or {})} | sampling)
        servers.append(CompletionServer(config.http, say=lambda text: None))
        return HttpGenerator(
            model.causal,
            model.tokenizer,
            model.reward_tokens,
            config,
            CPU,
            server=servers[-1],
            publish=lambda: ("v1", folder),
            num_columns=model.model.get_output_embeddings().weight.shape[0],
        )

    yield made
    for server in servers:
        server.close()


@pytest.mark.parametrize("quantile", [None, 0, 4])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_new_tokens": 2}]
)
def test_completions_are_those_of_the_model_at_hand(
    make: Make, policy: Policy, quantile: int | None, settings: dict[str, Any]
) -> None:
    found = make(**settings).generate(PROMPTS, quantile=quantile, seed=5)
    config = SamplingConfig(max_new_tokens=6, **settings)
    alone = TransformersGenerator(policy, policy.tokenizer, policy.reward_tokens, config, CPU)
    assert [c.prompt for c in found] == PROMPTS
    assert {c.finish_reason for c in found} == {FinishReason.STOP, FinishReason.LENGTH}
    for completion, seed in zip(found, row_seeds(5, len(PROMPTS)), strict=True):
        (expected,) = alone.generate([completion.prompt], quantile=quantile, seed=seed)
        assert completion.token_ids.tolist() == expected.token_ids.tolist()
        assert completion.token_ids.dtype == np.uint32
        assert completion.text == expected.text
        assert completion.finish_reason == expected.finish_reason
        assert (completion.reward_quantile, completion.seed) == (quantile, 5)
        assert abs(completion.logprob_policy - expected.logprob_policy) < 1e-4
        # The server does not say what it has tempered and truncated to.
        known = np.nan if settings else completion.logprob_policy
        np.testing.assert_equal(completion.logprob_sampled, known)


def test_every_setting_is_said_and_reward_tokens_are_banned(
    make: Make, policy: Policy, served: tuple[SamplingServer, dict[str, Any]]
) -> None:
    make(top_k=7, http={"model": "mine"}).generate(PROMPTS[:2], quantile=4, seed=1)
    requests = sorted(served[0].requests, key=lambda body: len(body["prompt"]))
    first = requests[0]
    assert first["prompt"] == [policy.reward_tokens.best, *PROMPTS[0].token_ids]
    assert first["logit_bias"] == {str(i): -100.0 for i in policy.reward_tokens.ids}
    assert first["stop_token_ids"] == ENDS
    named = ("model", "max_tokens", "temperature", "top_p", "top_k", "n", "repetition_penalty")
    assert [first[name] for name in named] == ["mine", 6, 1.0, 1.0, 7, 1, 1.0]
    assert len({body["seed"] for body in requests}) == 2
    assert {body["cache_salt"] for body in requests} == {"v1"}


def test_the_same_prompt_twice_is_sampled_twice(make: Make) -> None:
    found = make().generate([PROMPTS[0]] * 12, quantile=4, seed=1)
    assert len({tuple(c.token_ids.tolist()) for c in found}) > 3
    assert make().generate([], quantile=4, seed=1) == []


def changed(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda right: {"choices": [right["choices"][0] | fields]}


FULL = {"token_ids": [1] * 6, "finish_reason": "length"}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda right: 400, "answered status 400"),
        (lambda right: "tea", "something else than JSON"),
        (lambda right: {"choices": []}, '"choices" of one completion'),
        (lambda right: {"choices": right["choices"] * 2}, '"choices" of one completion'),
        (lambda right: "[]", '"choices" of one completion'),
        (changed(token_ids=None), 'without "token_ids".*return_token_ids'),
        (changed(token_ids=[True]), 'without "token_ids"'),
        (changed(token_ids=[]), "with 0 tokens"),
        (changed(token_ids=[1] * 7), "with 7 tokens, where 1 to 6"),
        (changed(token_ids=[VOCAB_SIZE]), f"token {VOCAB_SIZE}, outside the base vocabulary"),
        (changed(token_ids=[-1]), "token -1, outside"),
        (changed(prompt_token_ids=[1, 2, 3]), "tokens came back changed"),
        (changed(token_ids=[1, 2], finish_reason="stop"), "as ended, without"),
        (changed(token_ids=[EOS_ID, EOS_ID], finish_reason="stop"), "as ended, without"),
        (changed(token_ids=[EOS_ID], finish_reason="stop"), "an end after 0 tokens"),
        (changed(token_ids=[1, 2], finish_reason="length"), "2 tokens of 6"),
        (changed(**FULL | {"token_ids": [EOS_ID] * 6}), "an end among them"),
        (changed(finish_reason="abort"), "finish reason 'abort'"),
        (changed(**FULL, logprobs=None), "one log-probability for each token"),
        (changed(**FULL, logprobs={"token_logprobs": [-1.0] * 5}), "one log-probability"),
        (changed(**FULL, logprobs={"token_logprobs": [-1e9] * 6}), "from other weights"),
        (changed(**FULL, logprobs={"token_logprobs": [float("nan")] * 6}), "from other weights"),
    ],
)
def test_an_answer_that_cannot_be_right_names_the_server_and_the_prompt(
    make: Make, served: tuple[SamplingServer, dict[str, Any]], fault: Any, said: str
) -> None:
    state, address = served
    state.faults.append(fault)
    with pytest.raises(ModelError, match=said) as info:
        make(http={"retries": 0}, min_new_tokens=1).generate(PROMPTS[:1], quantile=4, seed=0)
    assert address["url"] in str(info.value)
    if "answered prompt" in str(info.value):
        assert "prompt 10" in str(info.value)


@pytest.mark.parametrize("fault", [500, 503, 429, "hang up", "sleep"])
def test_what_passes_is_tried_again(
    make: Make, served: tuple[SamplingServer, dict[str, Any]], fault: int | str
) -> None:
    served[0].faults += [lambda right: fault] * 2
    generator = make(http={"timeout_s": 0.4 if fault == "sleep" else 30.0})
    assert len(generator.generate(PROMPTS[:1], quantile=4, seed=0)) == 1
    assert len(served[0].requests) == 3
    served[0].faults += [lambda right: fault] * 2
    with pytest.raises(ModelError, match="gave no completion in 2 attempts"):
        make(http={"retries": 1, "timeout_s": 0.4}).generate(PROMPTS[:1], quantile=4, seed=0)


def test_a_server_with_other_weights_is_found_out(make: Make) -> None:
    other = make_policy()
    with torch.no_grad():
        for parameter in other.model.model.layers.parameters():
            parameter.mul_(1.3)
    with pytest.raises(ModelError, match="samples from other weights than it was given"):
        make(model=other).generate(PROMPTS, quantile=4, seed=0)


def test_a_server_that_never_comes_up_is_waited_for_and_named(policy: Policy, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    config = SamplingConfig(
        backend="http",
        http={"url": address, "reload_url": address, "startup_timeout_s": 0.0},
    )
    said: list[str] = []
    server = CompletionServer(config.http, say=said.append)
    with pytest.raises(ModelError, match="nothing answers at"):
        server.load("v1", folder)
    assert server.version is None
    assert len(said) == 1
    assert str(folder) in said[0]
    server.close()


def test_the_key_is_sent_and_never_shown(
    make: Make,
    served: tuple[SamplingServer, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QUARK_TEST_KEY", KEY)
    state = served[0]
    state.keys.clear()
    state.faults.append(lambda right: f"who is {KEY}?")
    generator = make(http={"api_key_env": "QUARK_TEST_KEY"})
    with pytest.raises(ModelError, match=r"who is \[key\]") as info:
        generator.generate(PROMPTS[:1], quantile=4, seed=0)
    assert KEY not in str(info.value)
    assert state.keys == {f"Bearer {KEY}"}
    monkeypatch.delenv("QUARK_TEST_KEY")
    with pytest.raises(ModelError, match="QUARK_TEST_KEY is not set"):
        make(http={"api_key_env": "QUARK_TEST_KEY"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"http": {"reload_url": "http://localhost"}}, r"needs sampling\.http\.url"),
        ({"http": {"url": "http://localhost"}}, r"needs sampling\.http\.reload_url"),
        ({"guidance": 1.0}, "a server does not guide"),
        ({"http": {"url": "https://me:pw@example.org"}}, "password"),
        ({"http": {"reload_url": "https://me:pw@example.org"}}, "password"),
        ({"http": {"reload_body": "{path}"}}, "must be JSON"),
        ({"http": {"reload_body": "{}"}}, "must have {path}"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    fitting = {"url": "http://localhost/v1", "reload_url": "http://localhost/reload"}
    with pytest.raises(ValidationError, match=said):
        SamplingConfig(**{"backend": "http", "http": fitting} | settings)
