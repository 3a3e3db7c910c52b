"""A scan is a loop over the samples, said in a language that can leave most of them unread."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from quark.errors import PoolCorruptedError
from quark.pool import scan as scan_module
from quark.pool.base import SampleBatch
from quark.pool.native import NativePool
from quark.pool.scan import SCANNED, score_column
from quark.pool.segments import segments_of
from tests.pool.batches import VOCAB_SIZE, make_batch

NAN = float("nan")
LONG = 40_000
"""Characters of a text that has blocks of its own in its segment."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a [pool]*"  # what a pattern would not find


def looped(pool: NativePool, ids: Sequence[int] | None = None) -> pl.DataFrame:
    """What a scan has to give, taken from the pool sample by sample."""
    keys = {
        id: segment.key
        for segment in segments_of(pool)
        for id in range(segment.first, segment.first + segment.count)
    }
    scores = {name: pool.scores(name) for name in pool.score_columns}
    rows = []
    for sample in pool.samples(range(len(pool)) if ids is None else ids):
        row = {name: getattr(sample, name) for name in SCANNED if name != "key"}
        row["key"] = keys[sample.id]
        assert sample.id in (pool.find(row["key"]) or ())
        row["prompt_tokens"] = sample.prompt_tokens.tolist()
        row["completion_tokens"] = sample.completion_tokens.tolist()
        row |= {score_column(name): float(scores[name][sample.id]) for name in scores}
        rows.append({n: None if v != v else v for n, v in row.items()})
    schema = SCANNED | {score_column(name): pl.Float32() for name in scores}
    return pl.DataFrame(rows, schema=schema, orient="row")


def varied(path: Path, appends: int = 7, *, vocab_size: int = VOCAB_SIZE) -> NativePool:
    """Appends of different sizes; score columns come and go, one is called like a column."""
    pool = NativePool.create(path, vocab_size=vocab_size)
    for number in range(appends):
        size = 1 + number * 5 % 7
        rewards = [math.inf if i == 2 else NAN if i == 3 else i / 4 for i in range(size)]
        scores = {"reward": rewards, "seed": rewards[::-1]} if number % 3 else {"reward": rewards}
        batch = make_batch(f"run/{number}", scores, content=number)
        pool.append(
            dataclasses.replace(batch, round=number // 2, chunk=number % 2, policy_step=10 * number)
        )
    return pool


def wide(number: int, size: int = 3) -> SampleBatch:
    """Samples whose texts are long enough to have blocks of their own."""
    batch = make_batch(f"wide/{number}", {"reward": [float(number)] * size}, content=number)
    texts = [chr(ord("a") + row) * LONG for row in range(size)]
    return dataclasses.replace(
        batch, completion_texts=texts, round=number, chunk=number, policy_step=number
    )


def damage(file: Path, offset: int, mask: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= mask
    file.chmod(0o600)
    file.write_bytes(data)


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 100_000])
def test_a_scan_is_a_loop_over_the_samples(path: Path, vocab_size: int) -> None:
    pool = varied(path, vocab_size=vocab_size)
    assert_frame_equal(pool.scan().collect(), looped(pool))
    assert pool.scan().collect_schema()["score:seed"] == pl.Float32
    assert pool.scan().select(pl.len()).collect().item() == len(pool)


def test_empty_pools_and_pools_without_text(path: Path) -> None:
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE, store_text=False)
    assert_frame_equal(pool.scan().collect(), looped(pool))
    pool.append(make_batch("a", {"reward": [1.0, NAN]}, with_texts=False))
    assert_frame_equal(pool.scan().collect(), looped(pool))
    assert pool.scan().select("completion_text").collect().to_series().to_list() == [None, None]


@pytest.fixture(scope="module")
def queried(tmp_path_factory: pytest.TempPathFactory) -> tuple[NativePool, pl.DataFrame]:
    pool = varied(tmp_path_factory.mktemp("scan") / "pool", appends=12)
    return pool, looped(pool)


_PREDICATES = st.sampled_from(
    [
        pl.lit(value=True),
        pl.lit(1) == 0,
        pl.col("id") > 7,
        pl.col("id").is_between(5, 21),
        pl.col("round") == 2,
        pl.col("chunk") != 1,
        pl.col("policy_step") < 50,
        pl.col("key").str.ends_with("4"),
        pl.col("reward") >= 0.5,
        pl.col("score:seed").is_null(),
        pl.col("reward_token") < pl.col("round"),
        pl.col("finish_reason").is_in([0, 2]),
        pl.col("completion_tokens").list.len() > 3,
        pl.col("prompt_text").str.contains("1"),
        pl.col("settings").str.contains("2"),
        pl.col("seed") > 2**63,
        pl.col("logprob_policy") < -0.5,
        pl.col("logprob_sampled") > pl.col("logprob_policy"),
    ]
)


@given(
    predicates=st.lists(_PREDICATES, min_size=1, max_size=3),
    columns=st.lists(st.sampled_from([*SCANNED, "reward", "score:seed"]), min_size=1, unique=True),
    head=st.none() | st.integers(0, 60),
    is_any=st.booleans(),
    is_filtered_first=st.booleans(),
)
@settings(max_examples=60)
def test_every_query_gives_what_it_gives_on_the_loop(
    queried: tuple[NativePool, pl.DataFrame],
    predicates: list[pl.Expr],
    columns: list[str],
    head: int | None,
    is_any: bool,
    is_filtered_first: bool,
) -> None:
    pool, frame = queried
    predicate = (pl.any_horizontal if is_any else pl.all_horizontal)(predicates)
    if not is_any:
        predicate = predicates[0]
        for other in predicates[1:]:
            predicate = predicate & other

    def query(of: pl.LazyFrame) -> pl.LazyFrame:
        if is_filtered_first:
            of = of.filter(predicate)
        if head is not None:
            of = of.head(head)
        return (of if is_filtered_first else of.filter(predicate)).select(columns)

    assert_frame_equal(query(pool.scan()).collect(), query(frame.lazy()).collect())


def test_batches_have_at_most_the_size_that_was_asked_for(path: Path) -> None:
    pool = varied(path)
    source = scan_module._Source(pool, segments_of(pool))
    for size in (1, 2, 5, 1000):
        frames = list(source.read(None, None, None, size))
        assert all(0 < frame.height <= size for frame in frames)
        assert len(frames) == math.ceil(len(pool) / size)
        assert_frame_equal(pl.concat(frames), looped(pool))
    few = list(source.read(["seed"], None, 9, 4))
    assert [frame.shape for frame in few] == [(4, 1), (4, 1), (1, 1)]


@pytest.mark.parametrize(
    "predicate",
    [
        pl.col("id").is_between(6, 8),
        pl.col("round") == 2,
        (pl.col("chunk") > 1) & (pl.col("chunk") < 3),
        pl.col("key") == "wide/2",
        (pl.col("reward") == 2.0) & pl.col("completion_text").str.starts_with("b"),
    ],
)
def test_segments_that_cannot_match_are_not_read(path: Path, predicate: pl.Expr) -> None:
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    for number in range(5):
        pool.append(wide(number))
    expected = looped(pool).filter(predicate)
    # The scores of all segments are known first; nothing but the texts of the others is damaged.
    segments = segments_of(pool)
    for segment in segments[:2] + segments[3:]:
        data = segment.file.read_bytes()
        damage(segment.file, data.index(b"b" * LONG) + LONG // 2)
    assert_frame_equal(pool.scan().filter(predicate).collect(), expected)
    with pytest.raises(PoolCorruptedError):
        pool.scan().select("completion_text").collect()


def test_segments_that_the_manifest_rules_out_are_not_even_opened(path: Path) -> None:
    pool = varied(path)
    expected = looped(pool).filter(pl.col("round") == 1).drop("reward", "score:seed")
    pool = NativePool.open(path)
    for segment in segments_of(pool):
        if segment.round != 1:
            segment.file.unlink()
    query = pool.scan().drop("reward", "score:seed")
    assert_frame_equal(query.filter(pl.col("round") == 1).collect(), expected)
    with pytest.raises(PoolCorruptedError, match="the file is missing"):
        query.collect()


def test_a_policy_step_that_cannot_match_leaves_a_segment_unread(path: Path) -> None:
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    for number in range(3):
        pool.append(wide(number))
    segment = segments_of(pool)[0]
    damage(segment.file, segment.file.read_bytes().index(b"b" * LONG) + LONG // 2)
    texts = pool.scan().filter(pl.col("policy_step") >= 1).select("completion_text").collect()
    assert texts.height == 6


def test_columns_that_are_not_asked_for_are_not_read(path: Path) -> None:
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    pool.append(wide(0))
    expected = looped(pool).drop("completion_text")
    [segment] = segments_of(pool)
    damage(segment.file, segment.file.read_bytes().index(b"b" * LONG) + LONG // 2)
    assert_frame_equal(pool.scan().drop("completion_text").collect(), expected)
    with pytest.raises(PoolCorruptedError, match="is damaged at offset"):
        pool.scan().collect()


def test_no_damaged_byte_is_served(path: Path) -> None:
    """Every block of a segment in turn: what a scan gives is right, or it raises."""
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    batch = make_batch("a", {"reward": [0.5] * 3000}, content=3)
    texts = [str(row) * (row % 9) for row in range(3000)]
    pool.append(dataclasses.replace(batch, completion_texts=texts))
    expected = looped(pool)
    [segment] = segments_of(pool)
    sound = segment.file.read_bytes()
    caught = dict.fromkeys(SCANNED, 0)
    for block in range(0, len(sound), 4096):
        damage(segment.file, min(block + 2000, len(sound) - 1))
        for name in caught:
            try:
                served = NativePool.open(path).scan().select(name).collect()
            except PoolCorruptedError:
                caught[name] += 1
            else:
                assert_frame_equal(served, expected.select(name))
        segment.file.unlink()
        segment.file.write_bytes(sound)
    # A text of n bytes and a list of n tokens lie in about as many blocks.
    assert caught["completion_text"] >= sum(map(len, texts)) // 4096
    assert caught["completion_tokens"] >= len(batch.completion_tokens) * 2 // 4096
    assert caught["seed"] >= 3000 * 8 // 4096
    assert caught["id"] == caught["key"] == 0


def replace_files(path: Path) -> set[str]:
    """Put other bytes under every data file's name, which stays whole for those who have it open; which kinds."""
    kinds = set()
    for file in sorted(path.glob("*/*.arrow")):
        data = bytearray(file.read_bytes())
        for at in range(1000, len(data), 500):
            data[at] ^= 1
        staged = file.with_suffix(".staged")
        staged.write_bytes(data)
        staged.replace(file)
        kinds.add(file.parent.name)
    return kinds


def test_a_file_that_is_replaced_changes_no_answer(path: Path) -> None:
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    for number in range(3):
        pool.append(wide(number))
    pool.draft_scores("late", 0, np.arange(len(pool), dtype=np.float32))
    pool.publish_scores("late")
    expected = looped(pool)
    pool.close()
    query = NativePool.open(path).scan()
    columns = expected.columns
    read_before, read_after = query.select(columns), query.select("completion_text", "late")
    assert_frame_equal(read_before.collect(), expected)
    assert {"segments", "prompts", "scores"} <= replace_files(path)
    assert_frame_equal(read_before.collect(), expected)
    assert_frame_equal(read_after.collect(), expected.select("completion_text", "late"))
    for name in columns:
        assert_frame_equal(query.select(name).collect(), expected.select(name))
    with pytest.raises(PoolCorruptedError):
        NativePool.open(path).scan().collect()


def test_a_file_that_is_replaced_between_check_and_use_is_not_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    for number in range(3):
        pool.append(wide(number))
    expected = looped(pool)
    pool.close()
    taken = NativePool.arrow_rows

    def taken_and_replaced(
        pool: NativePool, spans: Sequence[range], columns: Sequence[str]
    ) -> bytes:
        rows = taken(pool, spans, columns)
        assert replace_files(path)
        return rows

    # The others are looked up in prompt files, which are opened later and found to be damaged.
    looked_up = ("prompt_text", "prompt_tokens", "prompt_metadata", "settings")
    query = NativePool.open(path).scan().drop(looked_up)
    monkeypatch.setattr(NativePool, "arrow_rows", taken_and_replaced)
    for _ in range(2):
        assert_frame_equal(query.collect(), expected.select(query.collect_schema().names()))


def test_only_the_extension_opens_files(path: Path) -> None:
    varied(path).close()
    pool = NativePool.open(path)
    query = pool.scan()
    opened: list[object] = []
    is_watching = [True]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if is_watching[0] and event == "open":
            opened.append(arguments[0])

    sys.addaudithook(hook)
    rows = query.collect()
    is_watching[0] = False
    assert rows.height == len(pool)
    assert not [name for name in opened if str(path) in str(name)]


def test_a_scan_is_pinned_to_its_snapshot(path: Path) -> None:
    pool = varied(path, appends=3)
    before = looped(pool)
    query = pool.scan()
    first = NativePool.open(path, snapshot=1)
    pool.append(make_batch("later", {"judge": [1.0]}))
    reader = NativePool.open(path)
    assert_frame_equal(query.collect(), before)
    pool.close()
    assert_frame_equal(query.collect(), before)
    assert "judge" in reader.scan().collect_schema()
    assert_frame_equal(reader.scan().collect(), looped(reader))
    assert_frame_equal(first.scan().collect(), before.head(len(first)).drop("score:seed"))


def test_snapshots_on_both_sides_of_a_new_log_are_found(path: Path) -> None:
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    number = 0
    while len(list(path.glob("manifest/*.log"))) < 2:
        pool.append(make_batch(f"{number}" + "x" * 900, {"reward": [1.0]}, content=number))
        number += 1
    for generation in (0, 1, number - 2, number - 1, number):
        old = NativePool.open(path, snapshot=generation)
        segments = segments_of(old)
        assert [segment.first for segment in segments] == list(range(generation))
        assert all(old.find(s.key) == range(s.first, s.first + 1) for s in segments)


def test_a_compacted_pool_is_scanned_like_before(path: Path) -> None:
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    for number in range(6):
        batch = make_batch(f"run/{number}", {"reward": [number + 0.5] * 9}, content=number)
        pool.append(dataclasses.replace(batch, round=number // 2))
    before = looped(pool)
    assert pool.compact().num_segments == 1
    assert len(segments_of(pool)) == 6
    assert_frame_equal(pool.scan().collect(), before)
    assert_frame_equal(
        pool.scan().filter(pl.col("round") == 2, pl.col("seed") > 0).collect(),
        before.filter(pl.col("round") == 2, pl.col("seed") > 0),
    )


def test_damage_in_one_append_of_a_compacted_file_is_named(path: Path) -> None:
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    for number in range(3):
        pool.append(wide(number))
    pool.compact()
    [file] = {segment.file for segment in segments_of(pool)}
    damage(file, file.read_bytes().rindex(b"b" * LONG) + LONG // 2, mask=0x80)
    texts = pool.scan().select("completion_text")
    with pytest.raises(PoolCorruptedError, match="is damaged at offset"):
        texts.collect()
    first = pool.scan().filter(pl.col("id") == 0).select("completion_text").collect()
    assert first.item() == "a" * LONG  # its own blocks are sound


def test_scores_that_were_written_anew_are_the_ones_that_count(path: Path) -> None:
    pool = varied(path)
    before = pool.scan()
    old = looped(pool)
    for name in ("reward", "judge"):
        pool.rescore(name, lambda prompts, completions: np.arange(len(completions)))
    assert_frame_equal(pool.scan().collect(), looped(pool))
    above = pool.scan().filter(pl.col("judge") > 4).select("id", "reward").collect()
    assert above.rows() == [(id, float(id)) for id in range(5, len(pool))]
    assert_frame_equal(before.collect(), old)


def test_a_query_in_sql(path: Path) -> None:
    pool = varied(path)
    counted = pl.SQLContext(pool=pool.scan()).execute(
        "SELECT round, COUNT(*) AS n, MAX(reward) AS best FROM pool WHERE reward < 9 GROUP BY round ORDER BY round"
    )
    frame = looped(pool).filter(pl.col("reward") < 9)
    expected = frame.group_by("round").agg(n=pl.len(), best=pl.col("reward").max()).sort("round")
    assert_frame_equal(counted.collect(), expected, check_dtypes=False)


def test_differences_may_be_below_zero(path: Path) -> None:
    pool = varied(path)
    query = "SELECT id - 1000, prompt_id - 1000, finish_reason - 3, round - 1000, chunk - 1000, policy_step - 1000 FROM pool"
    differences = pl.SQLContext(pool=pool.scan()).execute(query).collect()
    assert differences.max_horizontal().max() < 0
    assert pool.scan().filter(pl.col("round") - 1000 < 0).collect().height == len(pool)


@pytest.mark.parametrize(
    "condition", ["1 = 1", "TRUE", "1 = 0", "reward > 0.5 AND 1 = 1", "1 = 1 OR round = 0"]
)
def test_a_condition_without_a_column_keeps_all_rows_or_none(path: Path, condition: str) -> None:
    pool = varied(path)
    query = f"SELECT id FROM pool WHERE {condition}"
    ids = pl.SQLContext(pool=pool.scan()).execute(query).collect()
    expected = pl.SQLContext(pool=looped(pool)).execute(query).collect()
    assert_frame_equal(ids, expected, check_dtypes=False)
