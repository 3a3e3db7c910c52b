from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.testing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quark import arrow_sizes, bounded_files
from quark.arrow_sizes import record_batches_of
from quark.bounded_files import (
    BYTES_AT_ONCE,
    MAX_DEPTH,
    MAX_LINE_BYTES,
    ROWS_AT_ONCE,
    arrow_frames,
    lines_of,
    parquet_frames,
    parse_json,
)
from quark.errors import DataError
from quark.parquet_sizes import row_groups_of


def decoded_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return sum(group.num_bytes for group in row_groups_of(file))


def test_lines_come_with_numbers_and_without_ends(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b"one\n\r\ntwo\r\nthree")
    assert list(lines_of(file)) == [(1, b"one"), (2, b""), (3, b"two"), (4, b"three")]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_line_has_a_bound(tmp_path: Path, end: bytes) -> None:
    file = tmp_path / "lines"
    longest = b"x" * MAX_LINE_BYTES
    file.write_bytes(b"a\n" + longest + end)
    assert [len(line) for _, line in lines_of(file)] == [1, MAX_LINE_BYTES]
    file.write_bytes(b"a\n" + longest + b"x" + end)
    with pytest.raises(DataError, match="line 2 has more than 16,777,216 bytes"):
        list(lines_of(file))


@pytest.mark.parametrize(("opening", "closing"), ["[]", ('{"a":', "}")])
def test_json_has_a_bound_of_depth(opening: str, closing: str) -> None:
    def nested(depth: int) -> str:
        return opening * depth + "1" + closing * depth

    assert parse_json(nested(MAX_DEPTH)) == json.loads(nested(MAX_DEPTH))
    for depth in (MAX_DEPTH + 1, 2_000_000):
        with pytest.raises(ValueError, match=r"^nested more than 64 levels deep$"):
            parse_json(nested(depth))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "not JSON: .* at character 2"),
        (b'"\xff"', "not UTF-8 at byte 2"),
        ("9" * 5000, "a number has too many digits"),
    ],
)
def test_what_is_not_json_says_why(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@pytest.fixture(scope="module")
def mixed() -> pl.DataFrame:
    count = 50_000
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "number": np.arange(count),
            "text": ["text" * (row % 40) for row in range(count)],
            "tokens": [list(range(row % 7)) if row % 5 else None for row in range(count)],
            "lists": [[[]] * (row % 3) for row in range(count)],
            "record": [{"text": "a", "toxicity": row / count} for row in range(count)],
            "nothing": [None] * count,
            "same": ["constant"] * count,
            "seed": rng.integers(0, 2**60, count),
            "triple": pl.Series(np.zeros((count, 3))),
            "bytes": [rng.bytes(8)] * count,
        },
        schema_overrides={"tokens": pl.List(pl.UInt32), "lists": pl.List(pl.List(pl.String))},
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 1000},
        {"data_page_version": "2.0", "compression": "zstd"},
        {"use_dictionary": False, "compression": "none"},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ],
    ids=str,
)
def test_the_rows_of_every_writer_come_in_order(
    tmp_path: Path, mixed: pl.DataFrame, options: dict[str, Any]
) -> None:
    file = tmp_path / "a.parquet"
    if "column_encoding" in options:
        mixed = mixed.select("number", "text", "seed").head(5000)
    pq.write_table(mixed.to_arrow(), file, **options)
    frames = list(parquet_frames(file))
    assert max(frame.height for frame in frames) <= ROWS_AT_ONCE
    polars.testing.assert_frame_equal(pl.concat(frames), pl.read_parquet(file))
    assert decoded_bytes(file) >= mixed.estimated_size()


def test_polars_own_files_are_read(tmp_path: Path, mixed: pl.DataFrame) -> None:
    file = tmp_path / "*.parquet"  # not a pattern
    mixed.write_parquet(file, row_group_size=7000)
    polars.testing.assert_frame_equal(pl.concat(list(parquet_frames(file))), mixed)
    mixed.clear().write_parquet(file)
    [nothing] = parquet_frames(file)
    polars.testing.assert_frame_equal(nothing, mixed.clear())


def bomb(file: Path, kind: str) -> None:
    """Write a small file that decodes to more than 100 MB."""
    megabyte = "x" * 2**20
    options: dict[str, Any] = {}
    match kind:
        case "compressed":
            column, options = pa.array([megabyte] * 100), {"use_dictionary": False}
        case "shared beginnings":
            column = pa.array([megabyte] * 100)
            options = {"use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"}}
        case "runs of texts":
            zeros = pa.array(np.zeros(10_000_000, np.int8))
            column = pa.DictionaryArray.from_arrays(zeros, pa.array(["x"]))
        case "runs of numbers":
            column = pa.array(np.zeros(20_000_000, np.int64))
        case "runs of nulls":
            column = pa.nulls(20_000_000, pa.int64())
        case "runs in lists":
            tokens = pa.array(np.zeros(40_000_000, np.uint32))
            column = pa.ListArray.from_arrays(pa.array([0, len(tokens)]), tokens)
        case "runs of fixed length":
            column = pa.array([b"x" * 2**19], pa.binary(2**19)).take(pa.array([0] * 300))
    pq.write_table(pa.table({"a": column}), file, compression="zstd", **options)


@pytest.mark.parametrize(
    "kind",
    [
        "compressed",
        "shared beginnings",
        "runs of texts",
        "runs of numbers",
        "runs of nulls",
        "runs in lists",
        "runs of fixed length",
    ],
)
def test_what_expands_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file = tmp_path / "bomb.parquet"
    bomb(file, kind)
    assert file.stat().st_size < 400_000
    monkeypatch.setattr(bounded_files, "MAX_DECODED_BYTES", 100_000_000)
    monkeypatch.setattr(pl, "scan_parquet", None)  # nothing decodes it
    with pytest.raises(DataError, match=r"bytes and decodes to .* a file may decode to"):
        next(parquet_frames(file))


def test_a_bomb_of_gigabytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.parquet"
    part = pa.table({"a": ["x" * 2**20] * 200})
    with pq.ParquetWriter(file, part.schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(13):
            writer.write_table(part)
    assert file.stat().st_size < 400_000
    with pytest.raises(DataError, match=r"decodes to 2,726,3\d\d,\d\d\d; a file may decode to"):
        next(parquet_frames(file))


def test_a_row_and_a_row_group_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    text = "x" * (MAX_LINE_BYTES // 4)
    pl.DataFrame(
        {"a": [text[1:]] * 3, "b": [[text[1:]]] * 3, "c": [{"d": text}] * 3}
    ).write_parquet(file, row_group_size=2)
    assert pl.concat(list(parquet_frames(file))).height == 3
    pl.DataFrame({"a": ["", text * 2], "b": [[""], [text] * 2], "c": [None, "x"]}).write_parquet(
        file
    )
    with pytest.raises(DataError, match="row 2 takes more than 16,777,216 bytes"):
        list(parquet_frames(file))
    monkeypatch.setattr(bounded_files, "MAX_ROW_GROUP_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"row group 1 decodes to .* fewer rows in a row group"):
        list(parquet_frames(file))


def test_long_texts_come_in_small_frames(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    texts = [chr(ord("a") + row) * (MAX_LINE_BYTES - 1) for row in range(10)]
    pl.DataFrame({"text": texts}).write_parquet(file, compression="uncompressed")
    frames = list(parquet_frames(file))
    assert [frame.height for frame in frames] == [4, 4, 2]
    assert 4 * MAX_LINE_BYTES == BYTES_AT_ONCE
    assert pl.concat(frames)["text"].to_list() == texts


def varint(number: int) -> bytes:
    number <<= 1
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def test_a_footer_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": np.arange(2_000_000)}), file, use_dictionary=False)
    whole = file.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    body, footer = whole[: -8 - length], whole[-8 - length :]
    size = pq.ParquetFile(file).metadata.row_group(0).column(0).total_uncompressed_size
    is_known = decoded_bytes(file)
    assert varint(size) in footer
    file.write_bytes(body + footer.replace(varint(size), varint(size - 5_000_000)))
    assert decoded_bytes(file) == is_known
    # Rows without values: one number stands for the rows of the file, of the group and the values of the column.
    rows = varint(pq.ParquetFile(file).metadata.row_group(0).num_rows)
    file.write_bytes(body + footer.replace(rows, varint(2_000_000_000)[:4].ljust(len(rows))))
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(parquet_frames(file))


def test_a_list_in_any_place_of_a_footer_is_an_error_or_read(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pl.DataFrame({"a": [1], "b": ["x"]}).write_parquet(file)
    whole = file.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    for at in range(len(whole) - 8 - length, len(whole) - 8):
        damaged = bytearray(whole)
        damaged[at] = damaged[at] & 0xF0 | 9
        file.write_bytes(damaged)
        with file.open("rb") as opened, contextlib.suppress(ValueError):
            row_groups_of(opened)


@pytest.mark.parametrize("reader", [parquet_frames, arrow_frames])
def test_there_must_be_a_file(tmp_path: Path, reader: Any) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            list(reader(path))


def write_arrow(file: Path, table: pa.Table, codec: str | None = "zstd", rows: int = 10**9) -> None:
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with (
        pa.OSFile(str(file), "wb") as out,
        pa.ipc.new_file(out, table.schema, options=options) as ipc,
    ):
        ipc.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
@pytest.mark.parametrize("writer", ["polars", "pyarrow"])
def test_the_rows_of_arrow_files_come_in_order(
    tmp_path: Path, mixed: pl.DataFrame, codec: Any, writer: str
) -> None:
    file = tmp_path / "*.arrow"  # not a pattern
    if writer == "polars":
        mixed.write_ipc(file, compression=codec or "uncompressed")
    else:
        write_arrow(file, mixed.to_arrow(compat_level=pl.CompatLevel.oldest()), codec, rows=7000)
    frames = list(arrow_frames(file))
    assert max(frame.height for frame in frames) <= ROWS_AT_ONCE
    polars.testing.assert_frame_equal(pl.concat(frames), mixed)
    with file.open("rb") as opened:
        assert sum(batch.num_bytes for batch in record_batches_of(opened)) >= mixed.estimated_size()
    mixed.clear().write_ipc(file)
    [nothing] = arrow_frames(file)
    polars.testing.assert_frame_equal(nothing, mixed.clear())


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("kind", ["texts", "nulls", "lists"])
def test_an_arrow_file_that_expands_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, codec: str
) -> None:
    columns = {
        "texts": pa.array(["x" * 2**20] * 100),
        "nulls": pa.nulls(20_000_000),
        "lists": pa.ListArray.from_arrays(
            pa.array([0, 30_000_000]), pa.array(np.zeros(30_000_000, np.uint32))
        ),
    }
    file = tmp_path / "bomb.arrow"
    write_arrow(file, pa.table({"a": columns[kind]}), codec)
    assert file.stat().st_size < 600_000
    monkeypatch.setattr(bounded_files, "MAX_DECODED_BYTES", 100_000_000)
    monkeypatch.setattr(bounded_files, "MAX_EXPANSION", 1)
    monkeypatch.setattr(pl, "scan_ipc", None)  # nothing decodes it
    with pytest.raises(DataError, match=r"bytes and decodes to .* a file may decode to"):
        next(arrow_frames(file))


def test_a_row_and_a_record_batch_of_arrow_have_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.arrow"
    # All rows show one text that is stored once.
    shared = pl.DataFrame({"text": ["x" * (MAX_LINE_BYTES - 1)]})[[0] * 10]
    shared.write_ipc(file, compat_level=pl.CompatLevel.newest())
    assert [frame.height for frame in arrow_frames(file)] == [4, 4, 2]
    pl.DataFrame({"text": ["", "x" * (MAX_LINE_BYTES + 1)]}).write_ipc(file)
    with pytest.raises(DataError, match="row 2 takes more than 16,777,216 bytes"):
        list(arrow_frames(file))
    monkeypatch.setattr(bounded_files, "MAX_ROW_GROUP_BYTES", 1 << 20)
    with pytest.raises(
        DataError, match=r"record batch 1 decodes to .* fewer rows in a record batch"
    ):
        list(arrow_frames(file))


def nested_without_end(file: Path, depth: int) -> None:
    """Write an Arrow file of a few kilobytes with a column of 2**depth columns: both children of each are one table."""
    dtype = pa.int8()
    for _ in range(depth):
        dtype = pa.struct([("x", dtype), ("y", pa.int8())])
    write_arrow(file, pa.schema([("a", dtype)]).empty_table())
    data = bytearray(file.read_bytes())
    end = len(data) - 10
    length = int.from_bytes(data[end : end + 4], "little")
    footer = arrow_sizes._Table.root(bytes(data), end - length, end)
    field = next(iter(footer.table(1).tables(1)))
    while len(places := field.vector(5, 4)) == 2:
        field = next(iter(field.tables(5)))
        struct.pack_into("<I", data, places[1], field.at - places[1])
    file.write_bytes(data)


def test_a_schema_that_spells_out_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.arrow"
    nested_without_end(file, 3)
    [frame] = arrow_frames(file)
    assert frame.width == 1
    nested_without_end(file, 50)
    assert file.stat().st_size < 20_000
    with pytest.raises(DataError, match="its schema has more than 16,384 columns"):
        next(arrow_frames(file))


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array(["a", "b"]).dictionary_encode(), "'a' is dictionary-encoded, write it as plain"),
        (pa.array([b"x" * 16], pa.uuid()), "'a' has an extension type, write it as plain values"),
    ],
)
def test_arrow_files_hold_plain_values(tmp_path: Path, column: Any, says: str) -> None:
    file = tmp_path / "a.arrow"
    write_arrow(file, pa.table({"a": column}))
    with pytest.raises(DataError, match=says):
        next(arrow_frames(file))


def write_parquet(file: Path) -> None:
    pl.DataFrame({"a": [1, 2], "b": ["x", "y"], "c": [[1], []]}).write_parquet(file)


def write_compressed_arrow(file: Path) -> None:
    frame = pl.DataFrame({"a": [1, 2], "b": ["x", "y" * 20], "c": [[1], []]})
    frame.write_ipc(file, compression="zstd")


@pytest.mark.parametrize(
    ("write", "parse", "frames", "kind"),
    [
        (write_parquet, row_groups_of, parquet_frames, "Parquet"),
        (write_compressed_arrow, record_batches_of, arrow_frames, "Arrow IPC"),
    ],
    ids=["parquet", "arrow"],
)
def test_every_damaged_file_is_an_error_or_read(
    tmp_path: Path, write: Any, parse: Any, frames: Any, kind: str
) -> None:
    file = tmp_path / "a"
    write(file)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = rng.integers(0, 256)
        file.write_bytes(damaged)
        try:
            with file.open("rb") as opened:
                parse(opened)
        except ValueError:
            refused += 1
    assert 100 < refused < 1000
    for length in range(0, len(whole), 5):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"not a readable {kind} file|is empty"):
            list(frames(file))
