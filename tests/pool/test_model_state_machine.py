"""The durable pool and the plain-Python one, driven by the same operations, give the same answers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from quark.pool.base import (
    RemainderRule,
    Retained,
    SampleBatch,
    SamplePool,
    SamplingMode,
    TieRule,
)
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.scope import Lowest, MeanMinusVariance, RankMean, Scope, Score, WeightedSum
from tests.pool.batches import (
    VOCAB_SIZE,
    assert_same_batch,
    assert_same_content,
    assert_same_cut,
    assert_same_draws,
    make_batch,
)

# Few values, so that blocks of ties are long and boundaries fall inside them; and the odd ones.
TIED = [0.0, -0.0, 1.0, 0.5, -1.0]
ODD = [float("nan"), float("inf"), float("-inf"), 1e-45, -1e-45, 3.4028235e38]
SCORE = st.one_of(st.sampled_from(TIED), st.sampled_from(ODD), st.floats(width=32, allow_nan=False))
SCORES = st.one_of(
    st.lists(SCORE, min_size=1, max_size=40),
    st.builds(lambda value, size: [value] * size, SCORE, st.integers(1, 40)),
)
SEED = st.integers(0, 2**64 - 1)
NAME = st.sampled_from(["reward", "judge"])
SCOPE = st.builds(
    Scope,
    last_rounds=st.one_of(st.none(), st.integers(1, 3)),
    where=st.sampled_from(
        [
            None,
            "reward_token >= 2",
            "chunk < 50 AND logprob_policy < -0.2",
            "logprob_sampled > logprob_policy",
        ]
    ),
    per_prompt=st.booleans(),
)


def scores_of(columns: tuple[str, ...]) -> st.SearchStrategy[Score]:
    return st.one_of(
        st.sampled_from(columns),
        st.just(WeightedSum(dict.fromkeys(columns, -0.5))),
        st.just(Lowest(columns)),
        st.just(MeanMinusVariance(columns, 0.25)),
        st.just(RankMean(columns)),
    )


COLUMNS = st.sampled_from([("reward",), ("reward", "judge"), ("judge",)])
NUM_QUANTILES = st.one_of(st.integers(1, 8), st.integers(1, 200))


def merge(pool: SamplePool) -> None:
    """What a merge of small files changes in a pool as it is read."""


class TwoPools(RuleBasedStateMachine):
    """A pool on disk, a model of it, and a reader that may lag behind."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.batches: list[SampleBatch] = []
        self.commits: list[Callable[[SamplePool], object]] = []
        self.sources: dict[str, str] = {}
        self.reader_generation = 0

    @initialize(tie_seed=SEED, store_text=st.booleans())
    def create(self, tie_seed: int, store_text: bool) -> None:
        self.tie_seed, self.store_text = tie_seed, store_text
        self.pool = NativePool.create(
            self.folder / "pool", vocab_size=VOCAB_SIZE, store_text=store_text, tie_seed=tie_seed
        )
        self.model = self.model_at(0)
        self.reader = NativePool.open(self.folder / "pool")

    def model_at(self, generation: int) -> MemoryPool:
        model = MemoryPool(
            vocab_size=VOCAB_SIZE, store_text=self.store_text, tie_seed=self.tie_seed
        )
        for commit in self.commits[:generation]:
            commit(model)
        return model

    def append_both(self, scores: dict[str, list[float]], content: int) -> None:
        key = f"run/{len(self.batches)}"
        batch = make_batch(key, scores, content=content, with_texts=self.store_text)
        assert self.pool.append(batch) == self.model.append(batch)
        self.batches.append(batch)
        self.commits.append(lambda pool: pool.append(batch))
        # An append merges small files where there are too many, each time in a commit of its own.
        self.commits += [merge] * (self.pool.snapshot.generation - len(self.commits))

    @rule(scores=SCORES, columns=COLUMNS, content=st.integers(0, 2**32 - 1))
    def append(self, scores: list[float], columns: tuple[str, ...], content: int) -> None:
        by_name = {"reward": scores, "judge": scores[::-1]}
        self.append_both({name: by_name[name] for name in columns}, content)

    @rule(number=st.integers(2, 30), content=st.integers(0, 2**16))
    def append_many_small(self, number: int, content: int) -> None:
        rng = np.random.default_rng(content)
        for _ in range(number):
            size = int(rng.integers(1, 4))
            self.append_both({"reward": rng.choice(TIED + ODD, size).tolist()}, content)

    def commit_both(self, commit: Callable[[SamplePool], object]) -> None:
        commit(self.pool)
        commit(self.model)
        self.commits.append(commit)

    def refuse_both(self, commit: Callable[[SamplePool], object]) -> None:
        before = self.pool.snapshot
        for pool in (self.pool, self.model):
            with pytest.raises(ValueError):
                commit(pool)
        assert self.pool.snapshot == before

    @rule(name=NAME, scores=SCORES, source=st.sampled_from(['{"by": 1}', '{"by": 2}']))
    def draft(self, name: str, scores: list[float], source: str) -> None:
        end = self.model.draft_end(name) or self.model.num_removed
        values = np.array(scores, dtype=np.float32)
        fits = 0 < end + len(values) <= len(self.model)
        same = self.sources.get(name, source) == source
        commit = lambda pool: pool.draft_scores(name, end, values, source=source)  # noqa: E731
        if fits and same:
            self.sources[name] = source
            self.commit_both(commit)
        else:
            self.refuse_both(commit)
        self.refuse_both(lambda pool: pool.draft_scores(name, end + 41, values, source=source))

    @precondition(lambda self: len(self.model) > 0)
    @rule(name=NAME, score=SCORE)
    def publish(self, name: str, score: float) -> None:
        end = self.model.draft_end(name) or self.model.num_removed
        missing = np.full(len(self.model) - end, score, dtype=np.float32)
        if missing.size:
            self.refuse_both(lambda pool: pool.publish_scores(name))
            source = self.sources.get(name, "{}")
            self.commit_both(lambda pool: pool.draft_scores(name, end, missing, source=source))
        self.sources.pop(name, None)
        self.commit_both(lambda pool: pool.publish_scores(name))

    @rule(name=NAME)
    def discard(self, name: str) -> None:
        if self.model.draft_end(name) is None:
            self.refuse_both(lambda pool: pool.discard_scores(name))
        else:
            del self.sources[name]
            self.commit_both(lambda pool: pool.discard_scores(name))

    @rule(
        samples=st.one_of(st.none(), st.integers(1, 60)),
        rounds=st.one_of(st.none(), st.integers(1, 6)),
        before=st.one_of(st.none(), st.integers(0, 40)),
    )
    def retain(self, samples: int | None, rounds: int | None, before: int | None) -> None:
        if samples is None and rounds is None and before is None:
            self.refuse_both(lambda pool: pool.retain())
            return

        def commit(pool: SamplePool) -> Retained:
            return pool.retain(max_samples=samples, max_rounds=rounds, before_round=before)

        generation = self.pool.snapshot.generation
        told = self.pool.retain(
            max_samples=samples, max_rounds=rounds, before_round=before, dry_run=True
        )
        assert self.pool.snapshot.generation == generation
        assert commit(self.pool) == commit(self.model) == told
        if told.num_appends:
            self.commits.append(commit)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def append_a_known_key_again(self, data: st.DataObject) -> None:
        known = data.draw(st.sampled_from(self.batches))
        other = make_batch(known.key, {"reward": [9.0]}, content=1, with_texts=self.store_text)
        before = self.pool.snapshot
        assert self.pool.append(other) == self.model.append(other) == self.model.find(known.key)
        assert self.pool.find(known.key) == self.model.find(known.key)
        assert self.pool.snapshot == before

    @rule(content=st.integers(0, 2**16))
    def append_a_token_outside_the_vocabulary(self, content: int) -> None:
        batch = make_batch("bad", {"reward": [1.0] * 20}, content=content)
        assume(len(batch.completion_tokens) > 0)
        batch.completion_tokens[-1] = VOCAB_SIZE
        before = self.pool.snapshot
        for pool in (self.pool, self.model):
            with pytest.raises(ValueError):
                pool.append(batch)
            assert pool.find("bad") is None
        assert self.pool.snapshot == before

    @rule()
    def reopen(self) -> None:
        before = self.pool.snapshot
        self.pool.close()
        self.pool = NativePool.open(self.folder / "pool", writable=True)
        assert self.pool.snapshot == before

    @rule()
    def refresh_the_reader(self) -> None:
        assert self.reader.refresh() == self.pool.snapshot
        self.reader_generation = len(self.commits)

    @rule()
    def content(self) -> None:
        assert_same_content(self.pool, self.model)

    @precondition(lambda self: len(self.model) > 0)
    @rule(data=st.data(), pad_id=st.integers(-1, VOCAB_SIZE))
    def gather(self, data: st.DataObject, pad_id: int) -> None:
        id_lists = st.lists(st.integers(self.model.num_removed, len(self.model) - 1), max_size=20)
        ids = np.array(data.draw(id_lists), dtype=np.uint64)
        assert_same_batch(
            self.pool.gather(ids, pad_id=pad_id), self.model.gather(ids, pad_id=pad_id)
        )
        for outside in (len(self.model), self.model.num_removed - 1):
            for pool in (self.pool, self.model):
                if outside >= 0:
                    with pytest.raises(IndexError):
                        pool.gather(np.array([outside], dtype=np.uint64), pad_id=pad_id)

    @rule(data=st.data(), which=st.sampled_from(["writer", "reader", "past"]))
    def quantize_and_sample(self, data: st.DataObject, which: str) -> None:
        pool: SamplePool = self.pool
        model: SamplePool = self.model
        if which == "reader":
            pool, model = self.reader, self.model_at(self.reader_generation)
        elif which == "past":
            generation = data.draw(st.integers(0, len(self.commits)))
            pool = NativePool.open(self.folder / "pool", snapshot=generation)
            model = self.model_at(generation)
        assume(model.score_columns)
        self.compare_quantizations(data, pool, model)

    def compare_quantizations(
        self, data: st.DataObject, pool: SamplePool, model: SamplePool
    ) -> None:
        num_quantiles = data.draw(NUM_QUANTILES)
        score = data.draw(scores_of(model.score_columns))
        scope = data.draw(SCOPE)
        ties = data.draw(st.sampled_from(TieRule))
        remainder = data.draw(st.sampled_from(RemainderRule))
        if scope.per_prompt:
            remainder = RemainderRule.SPREAD
        cut, expected = (
            p.quantize(num_quantiles, score=score, scope=scope, ties=ties, remainder=remainder)
            for p in (pool, model)
        )
        assert_same_cut(cut, expected, model.num_removed)

        batch_size = data.draw(st.integers(1, 33))
        seed = data.draw(SEED)
        mode = data.draw(st.sampled_from(SamplingMode))
        labels = st.lists(st.integers(0, num_quantiles - 1), min_size=1, max_size=num_quantiles)
        only = data.draw(st.one_of(st.none(), labels))
        if not any(expected.counts[range(num_quantiles) if only is None else only]):
            for quantization in (cut, expected):
                with pytest.raises(ValueError):
                    quantization.sampler(
                        batch_size=batch_size, seed=seed, mode=mode, quantiles=only
                    )
            return
        drawn, drawn_expected = (
            q.sampler(batch_size=batch_size, seed=seed, mode=mode, quantiles=only)
            for q in (cut, expected)
        )
        steps = data.draw(st.lists(st.integers(0, 2**64 - 1), max_size=3))
        assert_same_draws(drawn, drawn_expected, [0, 1, 2, *steps])

    @invariant()
    def sees_every_commit(self) -> None:
        assert self.pool.snapshot.generation == len(self.commits)
        num_merges = sum(commit is merge for commit in self.commits)
        assert self.model.snapshot.generation == len(self.commits) - num_merges
        assert len(self.pool) == len(self.model)
        assert self.reader.snapshot.generation == self.reader_generation
        for name in ("reward", "judge"):
            assert self.pool.draft_end(name) == self.model.draft_end(name)
            assert self.pool.draft_source(name) == self.model.draft_source(name)

    def teardown(self) -> None:
        self.reader.close()
        self.pool.close()
        report = NativePool.verify(self.folder / "pool")
        shutil.rmtree(self.folder)
        assert report.is_sound, report.problems


TestTwoPools = TwoPools.TestCase
TestTwoPools.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
