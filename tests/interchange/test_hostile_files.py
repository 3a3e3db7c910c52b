"""Files of other tools that were made to do harm, and values that a pool does not keep."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from quark.interchange import importing
from quark.interchange.layouts import MAX_SCORE_COLUMNS, Layout
from quark.pool.native import NativePool
from tests.interchange.foreign_files import json_lines
from tests.interchange.test_importing import counts, rows_of, take

LARGE = 10**400
"""A whole number that no float holds."""
TRL = {"step": 1, "prompt": "p", "completion": "c", "advantage": 0.0}
VERL = {"input": "p", "output": "c", "score": 1.0, "step": 1}
OPEN_INSTRUCT = {"prompt_tokens": [1], "response_tokens": [2], "reward": 1.0, "step": 1}
LM_EVAL = {"doc_id": 0, "arguments": [["p", {}]], "resps": [["c"]]}


def node(parent: object, text: str, **more: Any) -> dict[str, Any]:
    return {"parent": parent, "message": {"role": "user", "content": text}, **more}


def episode(**trace: Any) -> dict[str, Any]:
    nodes = [node(None, "p"), node(0, "c", sampled=True)]
    return {"task": {}, "traces": [{"nodes": nodes, **trace}]}


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "scores without a sum": (
        TRL,
        TRL | {"a": 1e308, "b": 1e308},
        "its scores: the numbers have no",
    ),
    "a large score": (VERL, VERL | {"score": LARGE}, "column score: the number is too large"),
    "opposite infinities": (
        OPEN_INSTRUCT,
        OPEN_INSTRUCT | {"logprobs": [1e999, -1e999]},
        "column logprobs: the numbers have no sum",
    ),
    "large log-probabilities": (
        OPEN_INSTRUCT,
        OPEN_INSTRUCT | {"logprobs": [LARGE]},
        "column logprobs: the numbers have no sum",
    ),
    "a low log-probability": (
        OPEN_INSTRUCT,
        OPEN_INSTRUCT | {"logprobs": [-1e300]},
        "column logprobs: -1e+300 does not fit into 32 bits",
    ),
    "a true step": (VERL, VERL | {"step": True}, "column step: True is not a whole number"),
    "a truth as a token": (
        OPEN_INSTRUCT,
        OPEN_INSTRUCT | {"prompt_tokens": [True]},
        "[True] is not a list of token ids",
    ),
    "rewards without a sum": (
        episode(),
        episode(rewards={"a": 1e308, "b": 1e308}),
        "column traces: the rewards: the numbers have no sum",
    ),
    "a parent that is text": (episode(), episode(nodes=[node("0", "p")]), "has no parent before"),
    "nodes in a circle": (episode(), episode(nodes=[node(0, "p")]), "has no parent before it"),
    "many scores": (
        episode(),
        episode(metrics={f"m{number}": 1 for number in range(MAX_SCORE_COLUMNS + 9)}),
        f"a file has at most {MAX_SCORE_COLUMNS} scores",
    ),
}
"""A row that is taken, one that is not, and why."""


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_of_hostile_values_is_refused_alone(tmp_path: Path, case: str) -> None:
    good, bad, reason = REFUSED[case]
    file = json_lines(tmp_path / "x.jsonl", [good, bad, good])
    results, refusals = take(tmp_path / "pool", file, template="{{ messages[0].content }}")
    assert counts(results) == (2, 0, 1), refusals
    assert refusals[0].row == 2
    assert reason in refusals[0].reason


TAKEN: dict[str, dict[str, Any]] = {
    "half of a character": VERL | {"note": "\ud800", "name \udfff": 1, "gts": {"\ud800": "\udc00"}},
    "numbers of many digits": VERL | {"note": [LARGE], "gts": [-LARGE, 2**64 - 1]},
    "no numbers": VERL | {"note": [float("nan"), {"x": float("inf")}]},
    "a task that is not finite": episode(task={"x": float("nan")}, id=float("inf")),
    "metrics that are a number": LM_EVAL | {"metrics": 3, "acc": 1.0},
    "metrics that are a text": LM_EVAL | {"metrics": "acc", "acc": 1.0},
}


@pytest.mark.parametrize("case", TAKEN)
def test_metadata_becomes_what_a_pool_keeps(tmp_path: Path, case: str) -> None:
    file = json_lines(tmp_path / "x.jsonl", [TAKEN[case]])
    results, refusals = take(tmp_path / "pool", file, template="{{ messages[0].content }}")
    assert (counts(results), refusals) == ((1, 0, 0), [])
    [row] = rows_of(tmp_path / "pool")
    for text in (row["prompt_metadata"], row["settings"]):
        json.dumps(json.loads(text, parse_constant=pytest.fail), ensure_ascii=False).encode()


def test_types_of_parquet_without_json_become_texts(tmp_path: Path) -> None:
    frame = pl.DataFrame({"prompt": ["p"], "completion": ["c"], "n": [1]}).with_columns(
        pl.lit(b"\xff\x00").alias("bytes"),
        pl.date(2026, 1, 2).alias("day"),
        pl.duration(days=1).alias("span"),
        pl.lit("1.5").cast(pl.Decimal(10, 2)).alias("price"),
        pl.struct(pl.lit(float("nan")).alias("x")).alias("nested"),
    )
    frame.write_parquet(tmp_path / "x.parquet")
    results, refusals = take(tmp_path / "pool", tmp_path / "x.parquet")
    assert (counts(results), refusals) == ((1, 0, 0), [])
    columns = json.loads(rows_of(tmp_path / "pool")[0]["settings"])["columns"]
    assert columns["day"] == ["2026-01-02"]
    assert columns["nested"] == [{"x": None}]


def test_a_row_does_not_become_more_than_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short row whose many samples repeat a long part of it."""
    monkeypatch.setattr(importing, "MAX_ROW_BYTES", 1 << 20)
    nodes = [node(None, "p"), *(node(number, "x") for number in range(300))]
    nodes += [node(300, "c", sampled=True) for _ in range(300)]
    rows = [
        LM_EVAL | {"doc": "d" * 10_000, "resps": [["c"]] * 5_000},
        {"task": {}, "traces": [{"nodes": nodes}]},
    ]
    for number, row in enumerate(rows):
        file = json_lines(tmp_path / f"{number}.jsonl", [row])
        results, [refusal] = take(tmp_path / "pool", file, template="{{ messages[0].content }}")
        assert counts(results) == (0, 0, 1)
        assert "its samples take more than 1,048,576 bytes" in refusal.reason


def test_every_row_may_have_columns_of_its_own(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": f"c{row}", **{f"column {row} {n}": "x" for n in range(40)}}
        for row in range(60)
    ]
    results, refusals = take(tmp_path / "pool", json_lines(tmp_path / "x.jsonl", rows))
    assert (counts(results), refusals) == ((60, 0, 0), [])


def test_long_samples_are_appended_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "MAX_ROW_BYTES", 100_000)
    rows = [{"prompt": "p", "completion": f"{row}" * 1_000} for row in range(6)]
    results, refusals = take(tmp_path / "pool", json_lines(tmp_path / "x.jsonl", rows))
    assert (counts(results), refusals) == ((6, 0, 0), [])
    with NativePool.open(tmp_path / "pool") as pool:
        assert pool.scan().select(pl.col("key").n_unique()).collect().item() > 1


@pytest.fixture
def deep_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with folders in it, one in another, deeper than Python recurses. Nothing else could delete them."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    deep = os.open(folder, os.O_RDONLY)
    for _ in range(1_200):
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    yield folder
    outer, inner = folder / "d", folder / "e"
    while (outer / "d").exists():
        (outer / "d").rename(inner)
        outer.rmdir()
        inner.rename(outer)


def test_of_a_folder_only_plain_files_are_read(tmp_path: Path, deep_folder: Path) -> None:
    folder = deep_folder
    json_lines(tmp_path / "mine" / "secret.jsonl", [VERL])
    (folder / "linked").symlink_to(tmp_path / "mine")
    (folder / "secret.jsonl").symlink_to(tmp_path / "mine" / "secret.jsonl")
    (folder / "dir.jsonl").mkdir()
    os.mkfifo(folder / "pipe.jsonl")
    json_lines(folder / "x.jsonl", [VERL])
    results, refusals = take(tmp_path / "pool", folder)
    assert [result.file for result in results] == [folder / "x.jsonl"]
    assert refusals == []


def test_a_pipe_that_is_named_is_no_file(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.csv", "x.parquet", "x.eval", "x.json"):
        os.mkfifo(tmp_path / name)
        for layout in (None, Layout.INSPECT):
            with pytest.raises(FileNotFoundError, match="there is no file"):
                take(tmp_path / "pool", tmp_path / name, layout=layout)


def test_a_log_of_inspect_is_measured_whatever_its_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.json", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples/1.json", b" " * (1 << 27))
    results, refusals = take(tmp_path / "pool", tmp_path / "x.json", layout=Layout.INSPECT)
    assert counts(results) == (0, 0, 1)
    assert "134,217,728 bytes" in str(refusals[0])


def test_a_file_whose_name_is_not_unicode_is_taken(tmp_path: Path) -> None:
    name = os.fsdecode(b"x\xff.jsonl")
    results, refusals = take(tmp_path / "pool", json_lines(tmp_path / name, [VERL]))
    assert (counts(results), refusals) == ((1, 0, 0), [])
