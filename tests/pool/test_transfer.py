"""Samples leave a pool for a file or another pool and are the same there."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import re
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from quark.errors import ConfigError, DataError, PoolCorruptedError
from quark.pool import ingest, rows
from quark.pool.export import RowFormat, export_pool, write_rows
from quark.pool.ingest import import_file, merge_pools
from quark.pool.native import NativePool
from quark.pool.rows import rows_of_file
from quark.pool.segments import segments_of
from tests.full_disk import full_disk_for_publications
from tests.pool.batches import VOCAB_SIZE, fields, make_batch

NAN = float("nan")
FORMATS = ["x.parquet", "x.jsonl", "x.arrow"]


def filled(
    path: Path, keys: str = "abc", *, with_infinity: bool = True, texts: bool = True
) -> NativePool:
    pool = NativePool.create(
        path, vocab_size=VOCAB_SIZE, store_text=texts, tie_seed=7, metadata={"model": "m", "n": 1}
    )
    for number, key in enumerate(keys):
        infinity = -math.inf if with_infinity else 3.5
        scores = {"reward": [0.1, NAN, infinity, -0.0], "seed": [NAN, 1e-38, 2.0, NAN]}
        pool.append(make_batch(f"run/{key}", scores, content=number, with_texts=texts))
    return pool


def assert_same_samples(pool: NativePool, expected: NativePool) -> None:
    """Every column of every sample, every score bit by bit; prompts are numbered anew."""
    assert pool.score_columns == expected.score_columns
    assert_frame_equal(everything(pool).drop("prompt_id"), everything(expected).drop("prompt_id"))
    ids = range(len(expected))
    for ours, theirs in zip(pool.samples(ids), expected.samples(ids), strict=True):
        assert fields(dataclasses.replace(ours, prompt_id=0)) == fields(
            dataclasses.replace(theirs, prompt_id=0)
        )


def everything(pool: NativePool) -> pl.DataFrame:
    return pool.scan().collect()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("texts", [True, False])
@pytest.mark.parametrize("rows_at_once", [3, 8192])
def test_what_is_exported_and_imported_is_the_same_sample_by_sample(
    tmp_path: Path, name: str, texts: bool, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_ROWS_AT_ONCE", rows_at_once)
    pool = filled(tmp_path / "a", with_infinity=name != "x.jsonl", texts=texts)
    assert export_pool(pool, tmp_path / name) == 12
    done = import_file(tmp_path / "b", tmp_path / name, vocab_size=VOCAB_SIZE)
    assert (done.num_appended, done.num_known) == (12, 0)
    with NativePool.open(tmp_path / "b") as copy:
        assert_same_samples(copy, pool)
        assert [copy.find(f"run/{key}") for key in "abc"] == [
            range(0, 4),
            range(4, 8),
            range(8, 12),
        ]
        assert copy.snapshot.generation == 3
        for other in FORMATS[::2]:  # the same rows, whatever they came through
            export_pool(copy, tmp_path / f"again-{other}")
        assert_frame_equal(pl.read_parquet(tmp_path / "again-x.parquet"), everything(copy))
        assert_frame_equal(pl.read_ipc(tmp_path / "again-x.arrow"), everything(copy))


def test_a_parquet_file_brings_the_settings_of_its_pool(tmp_path: Path) -> None:
    pool = filled(tmp_path / "a")
    export_pool(pool, tmp_path / "x.parquet")
    import_file(tmp_path / "b", tmp_path / "x.parquet")
    with NativePool.open(tmp_path / "b") as copy:
        assert dataclasses.replace(copy.settings, uuid="") == dataclasses.replace(
            pool.settings, uuid=""
        )
    export_pool(pool, tmp_path / "x.arrow")
    with pytest.raises(ConfigError, match="--vocab-size"):
        import_file(tmp_path / "c", tmp_path / "x.arrow")
    assert not (tmp_path / "c").exists()
    NativePool.create(tmp_path / "d", vocab_size=9).close()
    with pytest.raises(ConfigError, match="vocabulary of 9 tokens, not of 1000"):
        import_file(tmp_path / "d", tmp_path / "x.parquet")


def test_an_empty_pool_goes_through_a_file(tmp_path: Path) -> None:
    pool = NativePool.create(tmp_path / "a", vocab_size=5)
    for name in FORMATS:
        assert export_pool(pool, tmp_path / name) == 0
        done = import_file(tmp_path / name[2:], tmp_path / name, vocab_size=5)
        assert done.num_appended == 0
        assert len(NativePool.open(tmp_path / name[2:])) == 0


def test_an_import_extends_a_pool_and_knows_what_is_there(tmp_path: Path) -> None:
    old = filled(tmp_path / "a", "ab", with_infinity=False)
    old.close()
    export_pool(filled(tmp_path / "b", "abc", with_infinity=False), tmp_path / "x.jsonl")
    done = import_file(tmp_path / "a", tmp_path / "x.jsonl")
    assert (done.num_appended, done.num_known) == (4, 8)
    again = import_file(tmp_path / "a", tmp_path / "x.jsonl")
    assert (again.num_appended, again.num_known) == (0, 12)
    with NativePool.open(tmp_path / "a") as extended, NativePool.open(tmp_path / "b") as other:
        assert_same_samples(extended, other)


def test_an_export_is_whole_or_not_there(tmp_path: Path) -> None:
    pool = filled(tmp_path / "a", with_infinity=False)
    target = tmp_path / "x.parquet"
    target.write_text("mine")
    with pytest.raises(ConfigError, match="--force"):
        export_pool(pool, target)
    assert target.read_text() == "mine"
    export_pool(pool, target, is_overwriting=True)
    assert pl.read_parquet(target).height == 12
    file = segments_of(pool)[1].file
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1])
    for name in FORMATS:
        with pytest.raises(PoolCorruptedError):
            export_pool(NativePool.open(tmp_path / "a"), tmp_path / f"damaged-{name}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "x.parquet"]


def test_formats_say_what_they_cannot_hold(tmp_path: Path) -> None:
    pool = filled(tmp_path / "a")
    with pytest.raises(DataError, match="reward of sample 2 is infinite"):
        export_pool(pool, tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match="prompt_tokens, completion_tokens"):
        export_pool(pool, tmp_path / "x.csv")
    with pytest.raises(ConfigError, match=r"\.parquet, \.jsonl, \.arrow$"):
        export_pool(pool, tmp_path / "x.txt")
    with pytest.raises(ConfigError, match=r"\.parquet, \.jsonl, \.arrow$"):
        import_file(tmp_path / "b", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"\.parquet, \.jsonl, \.arrow, \.csv$"):
        write_rows(pool.scan(), tmp_path / "x.txt")
    with pytest.raises(ConfigError, match="CSV does not hold tokens"):
        import_file(tmp_path / "b", tmp_path / "x.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="is a directory"):
        write_rows(pool.scan().select("id"), tmp_path / "folder.csv", is_overwriting=True)
    with pytest.raises(FileNotFoundError, match="no directory"):
        export_pool(pool, tmp_path / "none" / "x.parquet")
    write_rows(pool.scan().select("id", "reward"), tmp_path / "x.csv")
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert lines[:4] == ["id,reward", "0,0.1", "1,", "2,-inf"]
    rewards = pl.col("reward")
    for nested in (pl.concat_list(rewards), pl.struct(rewards), pl.concat_list(pl.struct(rewards))):
        with pytest.raises(DataError, match="nested is infinite"):
            write_rows(pool.scan().select(nested.alias("nested")), tmp_path / "x.jsonl")
    write_rows(pl.LazyFrame({"a": [NAN, 1.0]}), tmp_path / "nan.jsonl")
    assert (tmp_path / "nan.jsonl").read_text() == '{"a":null}\n{"a":1.0}\n'
    assert not (tmp_path / "x.jsonl").exists()
    assert RowFormat.of(Path("A.PARQUET")) is RowFormat.PARQUET


@pytest.mark.parametrize("name", [*FORMATS, "x.csv"])
def test_a_full_disk_is_named_as_one(tmp_path: Path, name: str) -> None:
    pool = filled(tmp_path / "a", with_infinity=False)
    target = tmp_path / name
    with (
        full_disk_for_publications(),
        pytest.raises(OSError, match=re.escape(str(target))) as caught,
    ):
        write_rows(pool.scan().select("id", "key"), target)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def rows_of(tmp_path: Path) -> list[dict[str, object]]:
    pool = filled(tmp_path / "source", with_infinity=False)
    export_pool(pool, tmp_path / "rows.jsonl")
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("row", "column", "value", "says"),
    [
        (3, "seed", -1, "-1 is not UInt64"),
        (3, "seed", 2**64, "is not UInt64"),
        (6, "seed", True, "True is not UInt64"),
        (6, "round", 1.5, "1.5 is not UInt32"),
        (2, "reward_token", 40_000, "40000 is not Int16"),
        (1, "prompt_text", None, "None is not String"),
        (1, "prompt_text", "\ud800", "is not String"),
        (12, "completion_tokens", [1, "2"], "is not List"),
        (12, "completion_tokens", 7, "7 is not List"),
        (5, "completion_tokens", [VOCAB_SIZE], "token 1000 is outside the vocabulary of 1000"),
        (5, "prompt_tokens", [2, VOCAB_SIZE], "token 1000 is outside the vocabulary of 1000"),
        (7, "reward", "high", "'high' is not Float32"),
        (7, "reward", 1e39, "1e+39 is not Float32"),
        (7, "reward", -1e300, "-1e+300 is not Float32"),
        (7, "logprob_policy", 10**39, "is not Float32"),
        (7, "logprob_sampled", 10**39, "is not Float32"),
        (7, "finish_reason", 3, "3 is not in 0 .. 2"),
        (12, "reward_token", -2, "-2 is not in -1 .. 32767"),
        (4, "policy_step", 101, "not what the row before it"),
        (4, "settings", "{}", "not what the row before it"),
        (3, "completion_text", None, "missing, where the pool or other rows have it"),
        (10, "key", "run/a", "came before"),
        (2, "judge", 0.5, "the first row has none"),
    ],
)
def test_a_bad_row_is_named_with_file_and_column(
    tmp_path: Path, row: int, column: str, value: object, says: str
) -> None:
    rows = rows_of(tmp_path)
    rows[row - 1][column] = value
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match="row") as caught:
        import_file(tmp_path / "b", file, vocab_size=VOCAB_SIZE)
    assert str(caught.value).startswith(f"{file}: row {row}, column {column}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    ("column", "change", "says"),
    [
        ("seed", pl.lit(-1, pl.Int64), "row 1, column seed: -1 is not UInt64"),
        ("round", pl.lit(1.0), "row 1, column round: it has the type Float64, not UInt32"),
        ("key", pl.when(pl.col("id") != 5).then("key"), "row 6, column key: None is not String"),
        (
            "completion_tokens",
            pl.when(pl.col("id") == 7)
            .then(pl.lit([-3], pl.List(pl.Int64)))
            .otherwise(pl.col("completion_tokens").cast(pl.List(pl.Int64))),
            "row 8, column completion_tokens: [-3] is not List",
        ),
        ("reward", pl.lit(1e39), "row 1, column reward: 1e+39 is not Float32"),
        (
            "logprob_policy",
            pl.when(pl.col("id") == 2).then(-1e300),
            "row 3, column logprob_policy: -1e+300 is not Float32",
        ),
        ("reward_token", pl.lit(-5), "row 1, column reward_token: -5 is not in -1 .. 32767"),
        ("comment", pl.lit("good"), "row 1, column comment: it has the type String, not Float32"),
    ],
)
def test_a_bad_value_in_a_table_is_named_too(
    tmp_path: Path, ending: str, column: str, change: pl.Expr, says: str
) -> None:
    pool = filled(tmp_path / "a")
    file = tmp_path / f"bad{ending}"
    write_rows(pool.scan().with_columns(change.alias(column)), file)
    with pytest.raises(DataError) as caught:
        import_file(tmp_path / "b", file, vocab_size=VOCAB_SIZE)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, content, says in [
        ("a.jsonl", b"{}\n", "has no column prompt_text, prompt_tokens"),
        ("b.jsonl", b"[1]\n", "row 1 is not a JSON object"),
        ("c.jsonl", b"{\n", "row 1 is not JSON"),
        ("d.jsonl", b"\xff\n", "row 1 is not JSON"),
        ("d.jsonl", b" \n", "row 1 is an empty line$"),
        ("d.jsonl", b'{"a" 1}\n', "row 1 is not JSON: Expecting ':' delimiter at character 6$"),
        ("d.jsonl", b"[" * 100_000, "row 1 is nested more than 64 levels deep"),
        ("d.jsonl", b'{"seed": ' + b"9" * 5000 + b"}", "row 1 has a number that is too large$"),
        ("e.parquet", b"", "e.parquet is empty$"),
        ("f.arrow", b"", "f.arrow is empty$"),
        ("e.parquet", b"PAR1", "not a readable Parquet file"),
        ("f.arrow", b"ARROW1", "not a readable Arrow IPC file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=says):
            import_file(tmp_path / "b", tmp_path / name, vocab_size=5)
    for name in FORMATS:
        with pytest.raises(FileNotFoundError):
            import_file(tmp_path / "b", tmp_path / f"none-{name}", vocab_size=5)
    assert not (tmp_path / "b").exists()
    pool = filled(tmp_path / "a")
    for settings, says in [
        ("[", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"vocab_size": "x"}', "make no pool"),
    ]:
        write_rows(
            pool.scan(),
            tmp_path / "s.parquet",
            is_overwriting=True,
            metadata={"quark.pool": settings},
        )
        with pytest.raises(DataError, match=says):
            import_file(tmp_path / "b", tmp_path / "s.parquet")


def test_a_file_that_expands_without_end_makes_no_pool(tmp_path: Path) -> None:
    part = pa.table({"key": ["a"] * 200, "completion_text": ["x" * 2**20] * 200})
    bomb = tmp_path / "bomb.parquet"
    with pq.ParquetWriter(bomb, part.schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(13):
            writer.write_table(part)
    assert bomb.stat().st_size < 1_000_000
    long = tmp_path / "long.jsonl"
    long.write_bytes(b'{"key": "' + b"x" * (1 << 24) + b'"}\n')
    for file, says in ((bomb, "a file may decode to"), (long, "line 1 has more than 16,777,216")):
        with pytest.raises(DataError, match=says):
            import_file(tmp_path / "new", file, vocab_size=VOCAB_SIZE)
        assert not (tmp_path / "new").exists()


def test_long_rows_come_in_small_frames(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    for number, row in enumerate(rows):
        row["completion_text"] = chr(ord("a") + number) * 12_000_000
    frame = pl.DataFrame(rows * 4)
    for name in ("x.jsonl", "x.parquet"):
        if name == "x.jsonl":
            frame.write_ndjson(tmp_path / name)
        else:
            frame.write_parquet(tmp_path / name, compression="uncompressed")
        parts = list(rows_of_file(tmp_path / name))
        assert len(parts) > 1
        assert max(part.frame["completion_text"].str.len_bytes().sum() for part in parts) < 1 << 27
        assert [part.first for part in parts][:2] == [1, 1 + parts[0].frame.height]
        joined = pl.concat([part.frame for part in parts])
        assert joined["completion_text"].to_list() == frame["completion_text"].to_list()


def test_numbers_of_other_widths_are_taken_as_they_are(tmp_path: Path) -> None:
    """As another tool writes them back."""
    pool = filled(tmp_path / "a")
    widened = pool.scan().with_columns(
        pl.col("round", "chunk", "finish_reason").cast(pl.Int64),
        pl.col("reward").cast(pl.Float64).fill_null(NAN),
        pl.col("completion_tokens").cast(pl.List(pl.Int64)),
    )
    write_rows(widened, tmp_path / "x.parquet")
    import_file(tmp_path / "b", tmp_path / "x.parquet", vocab_size=VOCAB_SIZE)
    with NativePool.open(tmp_path / "b") as copy:
        assert_same_samples(copy, pool)


def test_infinities_are_taken_and_what_only_overflows_is_not(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    file = tmp_path / "x.jsonl"
    written = {
        "Infinity": math.inf,
        "3.4028235e38": 3.4028234663852886e38,
        "1e400": None,
        "-1e999": None,
    }
    for number, (text, value) in enumerate(written.items()):
        row = json.dumps(rows[0] | {"reward": "?"}).replace('"?"', text)
        file.write_text(row + "\n")
        path = tmp_path / f"{number}"
        if value is None:
            with pytest.raises(DataError, match=f"row 1, column reward: {text} is not Float32"):
                import_file(path, file, vocab_size=VOCAB_SIZE)
            continue
        import_file(path, file, vocab_size=VOCAB_SIZE)
        with NativePool.open(path) as pool:
            assert pool.scores("reward").tolist() == [value]


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_two_columns_are_not_one_score(tmp_path: Path, name: str) -> None:
    pool = filled(tmp_path / "a", with_infinity=False)
    write_rows(pool.scan().with_columns(pl.lit(0.7).alias("score:reward")), tmp_path / name)
    with pytest.raises(DataError, match="the columns reward and score:reward name the same score"):
        import_file(tmp_path / "b", tmp_path / name, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        (
            "completion_text",
            "other",
            "'other' here and .* in the pool, both under 'run/a'.*another key",
        ),
        ("completion_tokens", [1, 2, 3], r"\[1, 2, 3\] here and .*another key"),
        ("seed", 1, "1 here and .*another key"),
        ("reward", 0.75, "0.75 here and 0.1.* in the pool.*leave the number out"),
        ("logprob_policy", -0.5, "-0.5 here and .*leave the number out"),
        ("logprob_sampled", -0.5, "-0.5 here and .*leave the number out"),
        ("judge", 0.25, "0.25 here and None in the pool.*leave the number out"),
    ],
)
def test_other_samples_under_a_known_key_are_not_taken_for_those_that_are_there(
    tmp_path: Path, column: str, value: object, says: str
) -> None:
    file = tmp_path / "x.jsonl"
    rows = rows_of(tmp_path)
    rows[0][column] = value
    for row in rows[1:]:
        row.setdefault(column, None)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=f"row 1, column {column}: {says}"):
        import_file(tmp_path / "source", file)
    import_file(tmp_path / "b", file, vocab_size=VOCAB_SIZE)
    (merged,) = merge_pools(tmp_path / "source", [tmp_path / "b"])  # scores are not compared here
    assert merged.num_appended == (4 if "another key" in says else 0)


def test_what_was_scored_since_may_be_imported_again(tmp_path: Path) -> None:
    pool = filled(tmp_path / "a", with_infinity=False)
    export_pool(pool, tmp_path / "x.parquet")
    pool.rescore("judge", lambda prompts, completions: [1.0] * len(completions), source={})
    pool.close()
    assert import_file(tmp_path / "a", tmp_path / "x.parquet").num_known == 12


def test_texts_come_into_no_pool_of_tokens(tmp_path: Path) -> None:
    export_pool(filled(tmp_path / "a"), tmp_path / "x.parquet")
    export_pool(filled(tmp_path / "mute", texts=False), tmp_path / "mute.parquet")
    for keys in ("", "abc"):
        with NativePool.create(
            tmp_path / f"b{keys}", vocab_size=VOCAB_SIZE, store_text=False
        ) as pool:
            for number, key in enumerate(keys):
                pool.append(
                    make_batch(f"run/{key}", {"reward": [0.0]}, content=number, with_texts=False)
                )
        with pytest.raises(
            DataError, match="row 1, column completion_text: the pool keeps no texts: set"
        ):
            import_file(tmp_path / f"b{keys}", tmp_path / "x.parquet")
    with pytest.raises(DataError, match="row 1, column completion_text: missing, where the pool"):
        import_file(tmp_path / "a", tmp_path / "mute.parquet")


@pytest.mark.parametrize("had_directory", [False, True])
def test_a_failed_first_import_or_merge_leaves_no_pool_in_the_way(
    tmp_path: Path, had_directory: bool
) -> None:
    file, new = tmp_path / "x.jsonl", tmp_path / "new"
    rows_of(tmp_path)
    (tmp_path / "rows.jsonl").rename(file)
    if had_directory:
        new.mkdir()
    for size, error in ((9, DataError), (0, ConfigError), (2**32, ConfigError)):
        with pytest.raises(error):
            import_file(new, file, vocab_size=size)
        assert new.exists() == had_directory
    assert not had_directory or not any(new.iterdir())
    with NativePool.open(tmp_path / "source") as pool:
        segment = segments_of(pool)[0].file
    segment.chmod(0o600)
    data = segment.read_bytes()
    segment.write_bytes(data[:-1])
    with pytest.raises(PoolCorruptedError):
        merge_pools(new, [tmp_path / "source"])
    assert new.exists() == had_directory
    segment.write_bytes(data)
    import_file(new, file, vocab_size=VOCAB_SIZE)
    (merged,) = merge_pools(new, [tmp_path / "source"])
    assert merged.num_known == 12


@pytest.mark.parametrize("had_directory", [False, True])
def test_a_failed_first_import_removes_only_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, had_directory: bool
) -> None:
    new = tmp_path / "new"
    rows_of(tmp_path)
    if had_directory:
        new.mkdir()
    real = ingest._append_all

    def with_a_file_of_somebody(*args: Any, **options: Any) -> Any:
        (new / "notes.txt").write_text("mine")
        (new / "segments" / "theirs").write_text("theirs")
        return real(*args, **options)

    monkeypatch.setattr(ingest, "_append_all", with_a_file_of_somebody)
    with pytest.raises(DataError, match="outside the vocabulary"):
        import_file(new, tmp_path / "rows.jsonl", vocab_size=9)
    left = sorted(path.relative_to(new).as_posix() for path in new.rglob("*"))
    assert left == ["notes.txt", "segments", "segments/theirs"]


def test_what_came_before_an_error_stays(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    rows[-1]["completion_tokens"] = [VOCAB_SIZE]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="row 12"):
        import_file(tmp_path / "b", file, vocab_size=VOCAB_SIZE)
    assert len(NativePool.open(tmp_path / "b")) == 8


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    export_pool(filled(tmp_path / "a"), tmp_path / "x.parquet")
    with pytest.raises(FileNotFoundError, match=f"there is no directory {tmp_path / 'none'}$"):
        import_file(tmp_path / "none" / "b", tmp_path / "x.parquet")
    with pytest.raises(FileNotFoundError, match=f"there is no directory {tmp_path / 'none'}$"):
        merge_pools(tmp_path / "none" / "b", [tmp_path / "a"])


def test_a_part_of_a_key_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    pool = filled(tmp_path / "a", with_infinity=False)
    pool.close()
    write_rows(
        NativePool.open(tmp_path / "a").scan().filter(pl.col("id") < 6), tmp_path / "x.jsonl"
    )
    with pytest.raises(DataError, match="'run/b' is in the pool with 4 samples, here it has 2"):
        import_file(tmp_path / "a", tmp_path / "x.jsonl")


def test_merged_pools_hold_each_sample_once(tmp_path: Path) -> None:
    filled(tmp_path / "a", "ab").close()
    filled(tmp_path / "b", "abc").close()  # as if it went on from a copy of the first
    other = filled(tmp_path / "c", "xy")  # its own samples, one of them under a key of the others
    other.append(make_batch("run/a", {"reward": [5.0]}, content=50))
    sources = [tmp_path / name for name in "abc"]
    into = tmp_path / "all"
    done = merge_pools(into, sources)
    assert [(d.num_appended, d.num_known) for d in done] == [(8, 0), (4, 8), (9, 0)]
    done = merge_pools(into, sources)
    assert [(d.num_appended, d.num_known) for d in done] == [(0, 8), (0, 12), (0, 9)]
    other.close()
    [back] = merge_pools(tmp_path / "c", [into])  # only what the third one never had
    assert (back.num_appended, back.num_known) == (12, 9)
    with NativePool.open(into) as pool, NativePool.open(tmp_path / "c", snapshot=3) as other:
        assert len(pool) == 21
        assert pool.settings.metadata == {"model": "m", "n": 1}
        assert pool.find("run/a") == range(0, 4)
        [moved] = [s for s in segments_of(pool) if s.key.startswith("run/a#")]
        assert pool.samples([moved.first])[0].scores["reward"] == 5.0
        rows = pool.scan().filter(pl.col("id").is_between(12, 20))
        ignored = ["id", "prompt_id", "key"]
        assert_frame_equal(rows.drop(ignored).collect(), everything(other).drop(ignored))


def test_any_number_of_pools_may_have_a_key(tmp_path: Path) -> None:
    sources = [tmp_path / name for name in "abc"]
    for number, source in enumerate(sources):
        with NativePool.create(source, vocab_size=VOCAB_SIZE) as pool:
            pool.append(make_batch("k", {"reward": [float(number)]}, content=number))
    for num_appended in ([1, 1, 1], [0, 0, 0]):
        done = merge_pools(tmp_path / "all", sources)
        assert [part.num_appended for part in done] == num_appended
    with NativePool.open(tmp_path / "all") as pool:
        assert pool.scores("reward").tolist() == [0.0, 1.0, 2.0]


def test_pools_that_do_not_fit_are_not_merged(tmp_path: Path) -> None:
    filled(tmp_path / "a", "a").close()
    NativePool.create(tmp_path / "small", vocab_size=9).close()
    NativePool.create(tmp_path / "mute", vocab_size=VOCAB_SIZE, store_text=False).close()
    named = NativePool.create(
        tmp_path / "named", vocab_size=VOCAB_SIZE, metadata={"model": "other"}
    )
    named.append(make_batch("k", {"reward": [1.0]}))
    into = tmp_path / "into"
    for name, says in [
        ("small", "its vocab_size is 9, not 1000"),
        ("mute", "its store_text is False, not True"),
        ("named", "sampled from 'other', .* from 'm'.*--same-tokenizer"),
    ]:
        with pytest.raises(ConfigError, match=says):
            merge_pools(into, [tmp_path / "a", tmp_path / name])
        with pytest.raises(ConfigError, match=says):
            merge_pools(tmp_path / "a", [tmp_path / name])
        assert not into.exists()
    done = merge_pools(into, [tmp_path / "a", tmp_path / "named"], is_same_tokenizer=True)
    assert [d.num_appended for d in done] == [4, 1]
    assert NativePool.open(into).settings.metadata == {}
    NativePool.open(tmp_path / "a", writable=True).close()  # its lock was given back
    with pytest.raises(FileNotFoundError):
        merge_pools(into, [tmp_path / "none"])
