"""Another reward for a pool: in chunks, resumable, switched to in one commit, old snapshots as they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quark.pool.base import SamplePool, TieRule
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.rescore import rescore
from tests.pool.batches import VOCAB_SIZE, make_batch


def lengths(prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.float32]:
    return np.array(
        [len(p) - len(c) for p, c in zip(prompts, completions, strict=True)], np.float32
    )


def fill(pool: SamplePool, *, with_texts: bool = True) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        scores = {"reward": rng.random(10).tolist()}
        pool.append(make_batch(f"run/{i}", scores, content=i, with_texts=with_texts))


@pytest.fixture
def pool(tmp_path: Path) -> NativePool:
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    fill(pool)
    return pool


def expected_of(pool: SamplePool) -> NDArray[np.float32]:
    samples = pool.samples(range(len(pool)))
    return lengths([s.prompt_text for s in samples], [s.completion_text or "" for s in samples])


def test_all_scores_are_replaced_at_once_and_old_snapshots_keep_theirs(pool: NativePool) -> None:
    before, old = pool.scores("reward"), pool.snapshot
    calls: list[tuple[int, int]] = []
    result = pool.rescore(
        "reward",
        lengths,
        source={"name": "lengths"},
        chunk_size=16,
        on_chunk=lambda done, total: calls.append((done, total)),
    )
    assert (result.num_samples, result.num_resumed, result.num_failed) == (40, 0, 0)
    assert calls == [(16, 40), (32, 40), (40, 40)]
    np.testing.assert_array_equal(pool.scores("reward"), expected_of(pool))
    (column,) = pool.info().score_columns
    assert (column.version, dict(column.source)) == (2, {"name": "lengths"})
    assert column.std == pytest.approx(float(expected_of(pool).astype(np.float64).std()))
    assert pool.path is not None
    past = NativePool.open(pool.path, snapshot=old.generation)
    np.testing.assert_array_equal(past.scores("reward"), before)
    assert past.info().score_columns[0].version == 1


def test_a_column_that_began_after_its_draft_becomes_the_next_version(pool: NativePool) -> None:
    pool.draft_scores("judge", 0, np.zeros(40, np.float32))
    pool.append(make_batch("more", {"judge": [1.0] * 2}))
    versions = {column.name: column.version for column in pool.info().score_columns}
    assert versions == {"reward": 1, "judge": 1}
    pool.draft_scores("judge", 40, np.zeros(2, np.float32))
    pool.publish_scores("judge")
    assert [column.version for column in pool.info().score_columns] == [1, 2]
    pool.close()
    assert NativePool.open(pool.path).info().score_columns[1].version == 2


def test_a_reader_sees_the_old_scores_until_all_are_there(pool: NativePool) -> None:
    before = pool.scores("reward")
    assert pool.path is not None
    reader = NativePool.open(pool.path)
    seen = []

    def look(done: int, total: int) -> None:
        reader.refresh()
        seen.append((reader.scores("reward"), [d.num_covered for d in reader.info().drafts]))

    pool.rescore("reward", lengths, chunk_size=16, on_chunk=look)
    assert [covered for _, covered in seen] == [[16], [32], [40]]
    for scores, _ in seen:
        np.testing.assert_array_equal(scores, before)
    reader.refresh()
    np.testing.assert_array_equal(reader.scores("reward"), expected_of(pool))


def test_what_an_interrupted_attempt_scored_is_not_scored_again(pool: NativePool) -> None:
    asked: list[int] = []

    def fragile(prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.float32]:
        if len(asked) == 2:
            asked.append(0)
            raise KeyboardInterrupt
        asked.append(len(completions))
        return lengths(prompts, completions)

    with pytest.raises(KeyboardInterrupt):
        pool.rescore("reward", fragile, chunk_size=16, source={"name": "a"})
    pool.close()
    assert pool.path is not None
    with NativePool.open(pool.path, writable=True) as again:
        with pytest.raises(ValueError, match="restart"):
            again.rescore("reward", fragile, source={"name": "b"})
        with pytest.raises(ValueError, match="called 'Bad Name'"):
            again.rescore("Bad Name", fragile)
        assert len(asked) == 3, "nothing was scored for nothing"
        assert again.draft_source("reward") == '{"name": "a"}'
        result = again.rescore("reward", fragile, chunk_size=16, source={"name": "a"})
        assert (result.num_resumed, asked) == (32, [16, 16, 0, 8])
        np.testing.assert_array_equal(again.scores("reward"), expected_of(again))
        assert again.draft_source("reward") is None
        again.rescore("reward", lambda p, c: -lengths(p, c), restart=True)
        assert again.info().score_columns[0].version == 3


def test_samples_that_come_while_it_runs_are_scored_too(pool: NativePool) -> None:
    def meanwhile(prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.float32]:
        if pool.find("late") is None:
            pool.append(make_batch("late", {"reward": [0.25] * 5}, content=9))
        return lengths(prompts, completions)

    pool.rescore("reward", meanwhile, chunk_size=16)
    assert len(pool) == 45
    np.testing.assert_array_equal(pool.scores("reward"), expected_of(pool))


def test_scores_of_a_new_column_count_what_is_missing(pool: NativePool) -> None:
    def odd(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [1.0, *[float("nan")] * (len(completions) - 1)]

    assert pool.rescore("judge", odd, chunk_size=20).num_failed == 38
    assert pool.score_columns == ("reward", "judge")
    assert pool.quantize(2, score="judge").num_unranked == 38
    pool.append(make_batch("later", {"reward": [1.0]}, content=3))
    assert np.isnan(pool.scores("judge")[-1])


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda p, c: [1.0], "shape"),
        (lambda p, c: [[1.0]] * len(c), "shape"),
        (lambda p, c: [1e300] * len(c), "float32 cannot hold"),
    ],
)
def test_a_scorer_that_returns_nonsense_changes_nothing(
    pool: NativePool, scorer: object, message: str
) -> None:
    before = pool.snapshot
    with pytest.raises(ValueError, match=message):
        pool.rescore("reward", scorer)  # type: ignore[arg-type]
    assert pool.snapshot == before


def test_a_pool_without_texts_needs_a_decoder(tmp_path: Path) -> None:
    pools: list[SamplePool] = [
        NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE, store_text=False),
        MemoryPool(vocab_size=VOCAB_SIZE, store_text=False),
    ]
    for pool in pools:
        with pytest.raises(ValueError, match="no samples"):
            rescore(pool, "reward", lengths)
        fill(pool, with_texts=False)
        with pytest.raises(ValueError, match="decode"):
            rescore(pool, "reward", lengths)
        rescore(pool, "reward", lengths, decode=lambda rows: ["x" * len(row) for row in rows])
        samples = pool.samples(range(len(pool)))
        assert pool.scores("reward").tolist() == [
            len(s.prompt_text) - len(s.completion_tokens) for s in samples
        ]


def test_a_new_reward_k_and_tie_rule_give_new_batches_of_the_same_samples(pool: NativePool) -> None:
    pool.rescore("reward", lambda p, c: np.sign(lengths(p, c)))
    quantization = pool.quantize(3, ties=TieRule.TOGETHER)
    batch = quantization.sampler(batch_size=12, seed=0).batch(0, pad_id=0)
    signs = np.sign(expected_of(pool))
    np.testing.assert_array_equal(batch.scores, signs[batch.ids])
    # Equal scores have equal labels, and a better score never a lower one.
    labels = quantization.labels()
    assert all(len(set(labels[signs == sign].tolist())) <= 1 for sign in (-1, 0, 1))
    order = np.argsort(signs, kind="stable")
    assert (np.diff(labels[order]) >= 0).all()
