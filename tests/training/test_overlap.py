"""Scoring a chunk while the next one is generated changes when things happen, and nothing else."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from quark.config.load import load_config
from quark.errors import ModelError, RewardError
from quark.generation.base import SamplingConfig
from quark.generation.transformers_generator import TransformersGenerator
from quark.pool.native import NativePool
from quark.training.loop.background import BackgroundCall
from quark.types import Prompt
from tests.tiny import tiny_policy
from tests.training.tiny_run import fingerprint_of, train, write_inputs

SOURCE = '''
import threading
import time

begun = threading.Semaphore(0)
"""One permit for each chunk whose generation has begun."""
left = [0]
"""Chunks whose scoring is to wait until another one's generation has begun."""
threads = []
fails_at = [None]

def reward(prompts, completions):
    threads.append(threading.current_thread())
    if left[0]:
        left[0] -= 1
        assert begun.acquire(timeout=60), "nothing was generated meanwhile"
    if fails_at[0] == len(threads):
        raise ConnectionError("gone")
    return [sum(c < "a" for c in text) / (len(text) or 1) + 0.001 * len(text) for text in completions]
'''
CHUNKS_FIRST_ROUND = 3


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = write_inputs(tmp_path / "inputs")
    (path.parent / "tiny_reward.py").write_text(SOURCE)
    path.write_text(path.read_text().replace(":low_bytes", ":reward"))
    return path


@pytest.fixture
def reward(config: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The reward's module, as the next run loads it: what it is told is done before the first call."""
    import quark.rewards.callable as callables

    namespace: dict[str, Any] = {}
    load = callables._load_file

    def loading(path: Path) -> Any:
        module = load(path)
        for name, value in namespace.items():
            setattr(module, name, value)
        return module

    monkeypatch.setattr(callables, "_load_file", loading)
    exec(SOURCE, namespace)
    del namespace["__builtins__"], namespace["reward"]
    return namespace


def settings(overlaps: bool, *others: str) -> tuple[str, ...]:
    return (f"run.overlap_scoring={str(overlaps).lower()}", "run.num_rounds=2", *others)


def samples(run_dir: Path) -> tuple[int, list[str]]:
    with NativePool.open(run_dir / "pool") as pool:
        chunks = sorted({(s.round, s.chunk) for s in pool.samples(range(len(pool)))})
        return len(pool), [f"{round}/{chunk}" for round, chunk in chunks]


def test_the_run_is_the_same_and_scoring_truly_overlaps(
    config: Path, reward: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config, tmp_path / "apart", overrides=settings(False))
    main = threading.main_thread()
    assert {thread is main for thread in reward["threads"]} == {True}

    generate, calls = TransformersGenerator.generate, 0

    def generating(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        # The first call is the baseline's; the second chunk's begins while the first one's scores wait for it.
        if calls >= 3:
            reward["begun"].release()
        elif calls == 2:
            reward["left"][0] = CHUNKS_FIRST_ROUND - 1
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(TransformersGenerator, "generate", generating)
    reward["threads"].clear()
    train(config, tmp_path / "over", overrides=settings(True))
    assert [thread is main for thread in reward["threads"][:4]] == [True, False, False, False]
    assert fingerprint_of(tmp_path / "over") == fingerprint_of(tmp_path / "apart")

    lines = (tmp_path / "over" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    spans = next(row for row in rows if row["event"] == "round")["seconds_by_chunk"]
    assert [span["chunk"] for span in spans] == list(range(CHUNKS_FIRST_ROUND))
    for span, after in itertools.pairwise(spans):
        assert span["scoring"][1] > after["generating"][0]
        assert span["committing"][1] <= after["committing"][0]


def test_a_reward_that_fails_leaves_the_chunks_before_it_and_the_run_goes_on(
    config: Path, reward: Any, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    reward["fails_at"][0] = 3  # the baseline, one chunk, and then
    with pytest.raises(RewardError, match="ConnectionError: gone"):
        train(config, run_dir, overrides=settings(True))
    assert samples(run_dir) == (8, ["0/0"])
    reward["fails_at"][0] = None
    train(config, run_dir, overrides=settings(True))
    train(config, tmp_path / "whole", overrides=settings(False))
    assert fingerprint_of(run_dir) == fingerprint_of(tmp_path / "whole")


def test_what_waits_for_its_scores_is_not_lost_by_a_generator_that_fails(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = TransformersGenerator.generate, 0

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ModelError("no more")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(TransformersGenerator, "generate", failing)
    with pytest.raises(ModelError, match="no more"):
        train(config, tmp_path / "run", overrides=settings(True))
    assert samples(tmp_path / "run") == (8, ["0/0"])


def test_being_asked_to_stop_commits_what_was_generated(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    lives = 1
    while train(config, run_dir, overrides=settings(True), stop_at=7).interrupted:
        lives += 1
        assert lives < 50
    assert lives > 2
    train(config, tmp_path / "whole", overrides=settings(False))
    found, expected = fingerprint_of(run_dir), fingerprint_of(tmp_path / "whole")
    # Where it was stopped it left checkpoints that an undisturbed run has not.
    for fingerprint in (found, expected):
        del fingerprint["names"]
        fingerprint["files"] = {
            name: digest
            for name, digest in fingerprint["files"].items()
            if not name.startswith("checkpoints")
        }
    assert found == expected


@pytest.mark.parametrize("threads", [1, 2])
def test_a_scorer_that_shares_the_threads_gives_the_same_bits(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weights = (torch.randn(n, 256, generator=generator) for n in (64, 256))

    def scores() -> list[float]:
        hidden = inputs
        for _ in range(5):
            hidden = torch.tanh(hidden @ weights / 16.0)
        return hidden.softmax(-1).sum(0).tolist()

    policy = tiny_policy()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = scores()
        sampler = TransformersGenerator(
            policy, policy.tokenizer, None, SamplingConfig(max_new_tokens=4), torch.device("cpu")
        )
        prompts = [Prompt(index=i, text="", token_ids=(i,)) for i in range(8)]
        for seed in range(3):
            call = BackgroundCall(scores, name="scoring")
            sampler.generate(prompts, quantile=1, seed=seed)
            assert call.result() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"reward.name": "http", "reward.http.url": "http://localhost"}, True),
        ({"reward.name": "mine:reward"}, False),
        ({"reward.name": "mine:reward", "reward.timeout_s": 5}, True),
        ({"reward.name": "http", "pool.extra_scores": '["vader"]'}, True),
        ({"reward.name": "http", "pool.extra_scores": '["mine:reward"]'}, False),
        ({"reward.name": "http", "run.overlap_scoring": "false"}, False),
        ({"reward.name": "mine:reward", "run.overlap_scoring": "true"}, True),
    ],
)
def test_it_overlaps_by_itself_only_where_the_reward_cannot_care(
    settings: dict[str, Any], expected: bool
) -> None:
    loaded = load_config("demo", tuple(f"{key}={value}" for key, value in settings.items()))
    assert loaded.config.overlaps_scoring is expected
