"""``quark pool query``, ``export``, ``import`` and ``merge``, as commands."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from quark.pool.native import NativePool
from quark.pool.segments import segments_of
from tests.cli.commands import ROOT, quark, quark_process
from tests.full_disk import full_disk_for_publications
from tests.hostile_text import HOSTILE
from tests.pool.batches import VOCAB_SIZE, make_batch

NAN = float("nan")
ROUNDS = "SELECT round, COUNT(*) AS n, MAX(reward) AS best FROM pool GROUP BY round ORDER BY round"


def make_pool(path: Path, keys: str = "ab", *, vocab_size: int = VOCAB_SIZE) -> Path:
    with NativePool.create(path, vocab_size=vocab_size) as pool:
        for number, key in enumerate(keys):
            batch = make_batch(key, {"reward": [number + 0.5, NAN, 0.25]}, content=number)
            pool.append(dataclasses.replace(batch, round=number))
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return make_pool(tmp_path / "pool")


def contents(path: Path) -> list[dict[str, Any]]:
    with NativePool.open(path) as pool:
        return pool.scan().drop("prompt_id").collect().to_dicts()


def test_a_query_answers_people_and_scripts(pool: Path) -> None:
    asked = quark_process("pool", "query", pool, ROUNDS, "--json")
    assert asked.code == 0, asked.err
    assert asked.json == {
        "columns": ["round", "n", "best"],
        "rows": [[0, 3, 0.5], [1, 3, 1.5]],
        "is_complete": True,
    }
    assert asked.err == ""
    people = quark("pool", "query", pool, ROUNDS).out.split()
    assert people[:3] == ["round", "n", "best"]
    assert people[-6:] == ["0", "3", "0.5", "1", "3", "1.5"]


def test_a_query_in_a_run_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    make_pool(run / "pool")
    assert quark("pool", "query", run, ROUNDS, "--json").json["rows"][0] == [0, 3, 0.5]


def test_a_query_shows_as_many_rows_as_it_may(pool: Path) -> None:
    ids = "SELECT id FROM pool ORDER BY id"
    two = quark("pool", "query", pool, ids, "--limit", "2", "--json").json
    assert (two["rows"], two["is_complete"]) == ([[0], [1]], False)
    all_six = quark("pool", "query", pool, ids, "--limit", "6", "--json").json
    assert (len(all_six["rows"]), all_six["is_complete"]) == (6, True)
    cut = quark("pool", "query", pool, ids, "--limit", "2")
    assert "the first 2 rows" in cut.err
    assert "first" not in quark("pool", "query", pool, ids).err
    wide = quark("pool", "query", pool, "SELECT * FROM pool", "-n", "1").out
    assert re.search(r"^key +a *$", wide, flags=re.M)
    assert re.search(r"^reward +0\.5 *$", wide, flags=re.M)


def test_values_that_json_lacks(pool: Path) -> None:
    sql = (
        "SELECT reward, EXP(1000) AS infinite, DATE '2020-01-02' AS day, seed, completion_tokens"
        ", [DATE '2020-01-02'] AS days"
        " FROM pool WHERE id = 1"
    )
    [row] = quark("pool", "query", pool, sql, "--json").json["rows"]
    with NativePool.open(pool) as opened:
        [sample] = opened.samples([1])
    numbers = [sample.seed, sample.completion_tokens.tolist()]
    assert row == [None, None, "2020-01-02", *numbers, ["2020-01-02"]]


def test_the_rows_of_a_query_go_to_a_file(pool: Path, tmp_path: Path) -> None:
    sql = "SELECT id, prompt_text, reward FROM pool WHERE reward IS NOT NULL ORDER BY id"
    expected = [row for row in contents(pool) if row["reward"] is not None]
    for name in ("x.parquet", "x.jsonl", "x.arrow", "x.csv"):
        written = quark("pool", "query", pool, sql, "--out", tmp_path / name, "--json")
        assert written.code == 0, written.err
        assert written.json == {
            "out": str(tmp_path / name),
            "bytes": (tmp_path / name).stat().st_size,
        }
    frames = [pl.read_parquet(tmp_path / "x.parquet"), pl.read_ipc(tmp_path / "x.arrow")]
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()
    for rows in (*(frame.to_dicts() for frame in frames), [json.loads(line) for line in lines]):
        assert [(row["id"], row["reward"]) for row in rows] == [
            (row["id"], row["reward"]) for row in expected
        ]
        assert [row["prompt_text"] for row in rows] == [row["prompt_text"] for row in expected]
    with (tmp_path / "x.csv").open(encoding="utf-8", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [str(row["id"]) for row in expected]
    refused = quark("pool", "query", pool, sql, "--out", tmp_path / "x.csv")
    assert refused.code == 2
    assert "--force" in refused.err
    one = ("--out", tmp_path / "x.csv", "--force", "--limit", "1")
    assert quark("pool", "query", pool, sql, *one).code == 0
    assert len((tmp_path / "x.csv").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELEC 1", "SELEC is not a query"),
        ("SELECT rewrad FROM pool", '"rewrad"'),
        ("SELECT 1 FROM samples", "'samples' was not found"),
        ("SELECT prompt_text + 1 FROM pool", "the query cannot be run"),
        ("", "the query cannot be run"),
        ("DROP TABLE pool", "DROP is not a query"),
        (" -- all\n/* of\nit */;delete FROM pool WHERE id > 1", "DELETE is not a query"),
        ("TRUNCATE pool", "TRUNCATE is not a query"),
        ("CREATE TABLE more AS SELECT * FROM pool", "CREATE is not a query"),
    ],
)
def test_a_query_that_is_none_is_wrong_usage(pool: Path, sql: str, says: str) -> None:
    refused = quark("pool", "query", pool, sql, "--json")
    assert refused.code == 2, refused.err
    assert says in refused.err
    assert refused.out == ""


def test_damage_is_reported_by_queries_and_exports(pool: Path, tmp_path: Path) -> None:
    with NativePool.open(pool) as opened:
        file = segments_of(opened)[1].file
    file.chmod(0o600)
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    for command in (
        ("query", pool, "SELECT * FROM pool"),
        ("export", pool, tmp_path / "x.parquet"),
        ("merge", tmp_path / "other", pool),
    ):
        outcome = quark("pool", *command)
        assert outcome.code == 4
        assert f"{file.name} is damaged" in outcome.err
    assert not (tmp_path / "x.parquet").exists()


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".arrow", ".csv"])
def test_a_full_disk_is_one_line_and_the_way_out(pool: Path, tmp_path: Path, ending: str) -> None:
    target = tmp_path / f"x{ending}"
    commands = {"query": ["SELECT id FROM pool", "--out", target], "export": [target]}
    for command, arguments in commands.items():
        if (command, ending) == ("export", ".csv"):
            continue
        with full_disk_for_publications():
            outcome = quark("pool", command, pool, *arguments)
        assert outcome.code == 4, outcome.err
        error, way_out = outcome.err.splitlines()
        assert f"No space left on device: {target}" in error
        assert way_out == "  try: make room and run the same command"
        assert not list(tmp_path.glob("x*"))


def test_hostile_text_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    texts = [text for text in HOSTILE if "\ud800" not in text]
    batch = make_batch("\x1b[2Jkey", {"reward": [1.0] * len(texts)})
    with NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE) as pool:
        pool.append(dataclasses.replace(batch, completion_texts=texts))
    alias = 'SELECT ARRAY_AGG(completion_text) AS "\x1b[31m\u202e", key FROM pool GROUP BY id, key'
    for sql in ("SELECT * FROM pool", "SELECT key, completion_text FROM pool", alias):
        shown = quark("pool", "query", tmp_path / "pool", sql, "--limit", "500")
        assert shown.code == 0, shown.err
        assert all(c.isprintable() or c == "\n" for c in shown.out + shown.err)
        scripted = quark("pool", "query", tmp_path / "pool", sql, "--limit", "500", "--json")
        assert scripted.out.isascii()
        assert len(scripted.json["rows"]) == len(texts)
    wrong = quark("pool", "query", tmp_path / "pool", 'SELECT "\x1b[2J" FROM pool')
    assert wrong.code == 2
    assert wrong.err.replace("\n", "").isprintable()
    for name in ("x.jsonl", "x.parquet"):
        assert quark("pool", "export", tmp_path / "pool", tmp_path / name).code == 0
        arguments = ("pool", "import", tmp_path / f"of-{name}", tmp_path / name)
        done = quark(*arguments, "--vocab-size", VOCAB_SIZE)
        assert done.code == 0, done.err
        assert contents(tmp_path / f"of-{name}") == contents(tmp_path / "pool")


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.arrow"])
def test_an_export_is_imported_by_another_process(pool: Path, tmp_path: Path, name: str) -> None:
    exported = quark_process("pool", "export", pool, tmp_path / name, "--json")
    assert exported.code == 0, exported.err
    assert exported.json["samples"] == 6
    assert exported.json["snapshot"]["generation"] == 2
    assert exported.json["bytes"] == (tmp_path / name).stat().st_size
    copy = tmp_path / "copy"
    arguments = ("pool", "import", copy, tmp_path / name, "--vocab-size", str(VOCAB_SIZE), "--json")
    for appended, known in ((6, 0), (0, 6)):
        done = quark_process(*arguments)
        assert done.code == 0, done.err
        assert done.json == {"pool": str(copy), "appended": appended, "known": known}
    assert contents(copy) == contents(pool)
    assert quark("pool", "export", pool, tmp_path / name).code == 2
    assert "6 samples" in quark("pool", "export", pool, tmp_path / name, "--force").out
    assert "0 samples came, 6 were there" in quark(*arguments[:-1]).out


def test_a_bad_file_is_named_with_row_and_column(pool: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    assert quark("pool", "export", pool, file).code == 0
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[4]["seed"] = "\x1b[2J"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = quark("pool", "import", tmp_path / "copy", file, "--vocab-size", "1000")
    assert refused.code == 3
    assert f"{file}: row 5, column seed: " in refused.err
    assert refused.err.replace("\n", "").isprintable()
    assert quark("pool", "import", tmp_path / "copy", tmp_path / "none.jsonl").code == 3
    assert quark("pool", "import", tmp_path / "copy", tmp_path / "x.txt").code == 2


def test_pools_are_merged_once(pool: Path, tmp_path: Path) -> None:
    other = make_pool(tmp_path / "other", "abc")
    into = tmp_path / "all"
    for appended in ([6, 3], [0, 0]):
        done = quark_process("pool", "merge", into, pool, other, "--json")
        assert done.code == 0, done.err
        assert done.json["pool"] == str(into)
        assert [source["appended"] for source in done.json["sources"]] == appended
    assert [(s["path"], s["known"]) for s in done.json["sources"]] == [
        (str(pool), 6),
        (str(other), 9),
    ]
    assert contents(into) == contents(other)
    assert "9 were there" in quark("pool", "merge", into, other).out
    small = make_pool(tmp_path / "small", "", vocab_size=9)
    refused = quark("pool", "merge", into, small)
    assert refused.code == 2
    assert "vocab_size is 9, not 1000" in refused.err
    with NativePool.open(into, writable=True):
        locked = quark("pool", "merge", into, other)
    assert locked.code == 4
    assert "locked by pid" in locked.err


def test_a_part_of_a_pool_becomes_a_pool(pool: Path, tmp_path: Path) -> None:
    file = tmp_path / "part.parquet"
    with NativePool.open(pool) as whole:
        kept = whole.scan().filter(pl.col("id") >= 2, pl.col("reward") > 0.0).collect()
    assert 0 < kept.height < 4
    told = quark("pool", "export", pool, file, "--where", "id >= 2 AND reward > 0", "--json").json
    assert told["samples"] == kept.height
    assert quark("pool", "import", tmp_path / "part", file).code == 0
    with NativePool.open(tmp_path / "part") as part:
        own = ["id", "prompt_id"]
        assert_frame_equal(part.scan().drop(own).collect(), kept.drop(own))
    for wrong in ("nothing > 1", "SELECT", "reward"):
        refused = quark("pool", "export", pool, tmp_path / "x.parquet", "--where", wrong)
        assert refused.code == 2
        assert "where = " in refused.err
        assert "FAILED" not in refused.err
        assert refused.err.count("prompt_text") <= 1


def test_the_documented_fields_are_there(pool: Path, tmp_path: Path) -> None:
    table = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command, arguments in (
        ("pool query", ["query", pool, ROUNDS]),
        ("pool query --out", ["query", pool, ROUNDS, "--out", tmp_path / "q.csv"]),
        ("pool export", ["export", pool, tmp_path / "x.parquet"]),
        ("pool import", ["import", tmp_path / "copy", tmp_path / "x.parquet"]),
        ("pool merge", ["merge", tmp_path / "all", pool]),
    ):
        row = next(line for line in table.splitlines() if line.startswith(f"| `{command}` | "))
        outside_brackets = re.sub(r"\([^)]*\)", "", row.split(" | ")[1])
        documented = set(re.findall(r"`(\w+)`", outside_brackets))
        assert documented == set(quark("pool", *arguments, "--json").json), command
