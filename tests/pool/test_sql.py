"""SQL that comes from strangers sees a pool, and opens nothing else."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from quark.errors import ConfigError
from quark.pool.export import export_pool
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.scope import Scope, try_condition
from quark.pool.sql import MAX_CHARACTERS, MAX_DEPTH, MAX_OPERATORS, check_query, condition
from tests.cli.commands import quark
from tests.pool.batches import VOCAB_SIZE, make_batch

READERS = ("read_csv", "read_parquet", "read_ipc", "read_json", "read_ndjson")
COLUMNS = ("id", "reward", "key")
HUNDRED_THOUSAND = " OR ".join(["reward > 1"] * 100_000)


class Bait:
    """A named pipe and a server; whoever opens one of them leaves a trace."""

    def __init__(self, folder: Path) -> None:
        self.pipe = folder / "pipe"
        os.mkfifo(self.pipe)
        self._end = os.open(self.pipe, os.O_RDWR)
        os.write(self._end, b"x\n1\n")
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0)
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/x"

    def places(self) -> tuple[str, str]:
        return str(self.pipe), self.url

    def is_untouched(self) -> bool:
        pending = fcntl.ioctl(self._end, termios.FIONREAD, struct.pack("i", 0))
        try:
            guest, _ = self._server.accept()
        except BlockingIOError:
            return bool(struct.unpack("i", pending)[0] == 4)
        guest.close()
        return False

    def close(self) -> None:
        os.close(self._end)
        self._server.close()


@pytest.fixture
def bait(tmp_path: Path) -> Iterator[Bait]:
    bait = Bait(tmp_path)
    yield bait
    bait.close()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[NativePool]:
    with NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE) as pool:
        pool.append(make_batch("run/0", {"reward": [0.1, 0.9]}))
        yield pool


def test_the_bait_notices_a_reader(bait: Bait) -> None:
    assert bait.is_untouched()
    with socket.create_connection(bait._server.getsockname()):
        assert not bait.is_untouched()
    with bait.pipe.open("rb", buffering=0) as pipe:
        assert pipe.read(1) == b"x"
    assert not bait.is_untouched()


def conditions_that_read(place: str) -> list[str]:
    forms = (
        "{0}('{1}')",
        "reward > (SELECT MAX(x) FROM {0}('{1}'))",
        "reward IN (SELECT x FROM {0}('{1}'))",
        "reward > 0 OR EXISTS (SELECT 1 FROM {0} ('{1}'))",
        "reward > ANY (SELECT x FROM \"{0}\"('{1}'))",
        "reward NOT IN (FROM {0}/* a */('{1}'))",
        "CASE WHEN reward > 0 THEN (WITH a AS (SELECT * FROM {0}('{1}')) SELECT MAX(x) FROM a) END > 0",
    )
    names = (*READERS, "READ_CSV")
    return [form.format(name, place) for form in forms for name in names]


def test_no_condition_opens_anything(bait: Bait, pool: NativePool, tmp_path: Path) -> None:
    memory = MemoryPool(vocab_size=VOCAB_SIZE)
    memory.append(make_batch("run/0", {"reward": [0.1, 0.9]}))
    for place in bait.places():
        for where in conditions_that_read(place):
            with pytest.raises(ValueError, match="which is not among the functions"):
                condition(where, COLUMNS)
            with pytest.raises(ValueError, match=r"^where = .* calls "):
                try_condition(where, ("reward",))
            for some in (pool, memory):
                with pytest.raises(ValueError, match=r"^where = .* calls "):
                    some.quantize(2, scope=Scope(where=where))
            with pytest.raises(ConfigError, match=r"^where = .* calls "):
                export_pool(pool, tmp_path / "out.parquet", where=where)
    assert bait.is_untouched()
    assert not (tmp_path / "out.parquet").exists()


QUERIES_THAT_READ = (
    "SELECT * FROM {0}('{1}')",
    "FROM {0}('{1}')",
    "select * from pool, {0} ('{1}') r",
    "SELECT * FROM pool JOIN {0}('{1}') r ON true",
    "SELECT * FROM pool CROSS JOIN {0}\n('{1}') r",
    "SELECT * FROM pool WHERE id IN (SELECT x FROM {0}('{1}'))",
    "WITH c AS (SELECT * FROM {0}('{1}')) SELECT * FROM c",
    "SELECT id FROM pool UNION ALL SELECT x FROM {0}('{1}')",
    "SELECT * FROM \"{0}\"('{1}')",
    "SELECT * FROM `{0}`('{1}')",
    "SELECT * FROM {0}/* ( */('{1}')",
    "SELECT * FROM {0} -- (\n('{1}')",
    "SELECT 'it''s', \"\"\"\" FROM {0}('{1}')",
    "SELECT * FROM pool WHERE key = '--' OR id IN (SELECT x FROM {0}('{1}')) -- '",
    "SELECT * FROM pool /*! , {0}('{1}') */",
    "SELECT * FROM pool /* /* */ , {0}('{1}') r -- */",
    "SELECT * FROM pool -- \r , {0}('{1}') r",
    "SELECT E'\\' FROM {0}('{1}') -- '",
    "SELECT Q'(')' FROM {0}('{1}') -- '",
    "SELECT $$ ' $$ FROM {0}('{1}') -- '",
    "EXPLAIN SELECT * FROM {0}('{1}')",
    "CREATE TABLE t AS SELECT * FROM {0}('{1}')",
    "SELECT * FROM '{1}'",
    'SELECT * FROM "{1}"',
    "SELECT * FROM pool, other",
)


@pytest.mark.parametrize("form", QUERIES_THAT_READ)
def test_no_query_opens_anything(bait: Bait, pool: NativePool, form: str) -> None:
    for name in (*READERS, "Read_Csv") if form == QUERIES_THAT_READ[0] else ("read_csv",):
        for place in bait.places():
            refused = quark("pool", "query", pool.path, form.format(name, place), "--json")
            assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1), refused
            assert refused.err.startswith(("error: the query ", "error: CREATE is not a query"))
    assert bait.is_untouched()


def test_files_are_read_where_that_is_allowed(pool: NativePool, tmp_path: Path) -> None:
    frame = pl.DataFrame({"id": [1], "note": ["best"]})
    frame.write_csv(tmp_path / "a.csv")
    sql = f"SELECT reward, note FROM pool JOIN read_csv('{tmp_path}/a.csv') USING (id)"
    refused = quark("pool", "query", pool.path, sql)
    assert (refused.code, "--allow-files" in refused.err) == (2, True)
    told = quark("pool", "query", pool.path, sql, "--allow-files", "--json").json
    assert [note for _, note in told["rows"]] == ["best"]
    written = quark(
        "pool", "query", pool.path, sql, "--allow-files", "--out", tmp_path / "out.jsonl"
    )
    assert written.code == 0
    assert quark("pool", "query", pool.path, "DROP TABLE pool", "--allow-files").code == 2


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM pool",
        "select count(*), avg(reward) filter (where reward > 0) from pool group by (round)",
        "WITH a(x) AS (SELECT id FROM pool), b AS (SELECT id FROM a) SELECT * FROM b",
        "SELECT p.id FROM pool AS p JOIN (SELECT id FROM pool) AS q(id) USING (id)",
        "SELECT id::DECIMAL(10, 2), CAST(reward AS VARCHAR(9)) FROM pool -- (a comment) read_csv('x')",
        "SELECT 'read_csv(''x'')' AS \"read_csv(\" FROM pool /* read_csv('x') */;",
        "SELECT ROW_NUMBER() OVER (PARTITION BY round ORDER BY id) FROM pool QUALIFY (1 = 1)",
        "SELECT * EXCLUDE (id) REPLACE (1 AS round) FROM pool\r\nWHERE (id) IN (1) AND NOT (id = 2)",
        "(SELECT id FROM pool) UNION ALL (SELECT id FROM pool)",
        "SHOW TABLES",
        "VALUES (1)",
    ],
)
def test_what_sees_the_pool_alone_passes(sql: str) -> None:
    check_query(sql)


def test_every_function_that_a_query_may_call_is_one_of_polars_or_harmless(
    bait: Bait, pool: NativePool
) -> None:
    from quark.pool import sql

    tables = pl.SQLContext(pool=pool.scan())
    for name in sorted(sql._BEFORE_BRACKETS | sql._QUERY_FUNCTIONS):
        for place in bait.places():
            for text in (f"SELECT * FROM {name}('{place}') t", f"SELECT {name}('{place}')"):
                if name not in ("generate_series", "range"):
                    with_error = False
                    try:
                        tables.execute(text).collect()
                    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
                        with_error = True
                    assert with_error or "FROM" not in text or name in ("unnest", "values"), text
    assert bait.is_untouched()


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("nothing > 1", "names nothing; there are id, reward, key"),
        ("pool.reward > 1", "names pool; there are"),
        ("reward >", "is no SQL expression: "),
        ("reward > 1; reward > 2", "is no SQL expression: "),
        ("reward IN (SELECT reward FROM pool)", "has a subquery (SELECT)"),
        ("reward IN (VALUES (1))", "has a subquery (VALUES)"),
        ("COLUMNS('.*') > 1", "calls columns, which"),
        ("LPAD(key, 1000000000) = ''", "calls lpad, which"),
        ("REPLACE(key, 'a', 'bbb') = ''", "calls replace, which"),
        ("GENERATE_SERIES(1, 10000000000) = 1", "calls generate_series, which"),
        ("CAST(reward AS DECIMAL(1000, 2)) > 1", "calls decimal, which"),
        ("reward > 1 /*! OR true */", "which dialects read differently"),
        ("key = E'a'", "which dialects read differently"),
        ("key = 'a", "which begins or ends nothing"),
        ("key = $$a$$", "which begins or ends nothing"),
        ("reward > 1 /* OR", "that does not end"),
        (HUNDRED_THOUSAND, f"has 1,399,996 characters; the most is {MAX_CHARACTERS:,}"),
        (" OR ".join(["reward>1"] * 5000), f"has more than {MAX_OPERATORS:,} operators"),
        ("NOT " * 2000 + "reward > 1", "has more than 1,000 operators"),
        ("(" * 33 + "reward" + ")" * 33 + " > 1", f"has brackets more than {MAX_DEPTH} levels"),
        ("(" * 30000 + "reward" + ")" * 30000 + " > 1", "has brackets more than"),
    ],
)
def test_what_a_condition_may_not_say_is_refused_in_one_line(where: str, says: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError) as caught:
        condition(where, COLUMNS)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 20  # it took minutes


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("reward > 0.5", [False, True]),
        ("reward > AVG(reward) AND NOT (id IN (0, 2)) -- the better half", [False, True]),
        ("key LIKE 'run%' AND STARTS_WITH(key, 'run') AND LENGTH(key) = 5", [True, True]),
        ("CASE WHEN id = 0 THEN reward < 1 ELSE false END", [True, False]),
        ("CAST(id AS VARCHAR) = '1' OR COALESCE(reward, 0) < 0", [False, True]),
        ('"reward" BETWEEN 0 AND ROUND(0.5 + 0.01, 1)', [True, False]),
        ("id IN (" + ", ".join(map(str, range(1, 9000))) + ")", [False, True]),
        (" OR ".join(["reward > 0.5"] * 300), [False, True]),
        ("(" * 30 + "reward" + ")" * 30 + " > 0.5", [False, True]),
        ("ROW_NUMBER() OVER (ORDER BY reward DESC) = 1", [False, True]),
    ],
)
def test_what_a_condition_says_holds(where: str, expected: list[bool]) -> None:
    rows = pl.DataFrame({"id": [0, 1], "reward": [0.1, 0.9], "key": ["run/0"] * 2})
    assert rows.select(condition(where, COLUMNS)).to_series().to_list() == expected


@pytest.mark.parametrize(
    "command",
    [("head",), ("stats",), ("explain", "3"), ("report",), ("train",)],
    ids=lambda command: command[0],
)
def test_the_run_of_a_stranger_opens_nothing(
    bait: Bait, stranger: Path, command: tuple[str, ...]
) -> None:
    whole = (stranger / "config.toml").read_text(encoding="utf-8")
    assert 'ties = "hash"' in whole
    for where in (
        f"reward > (SELECT MAX(x) FROM read_csv('{bait.pipe}'))",
        f"EXISTS (SELECT 1 FROM read_csv('{bait.url}'))",
        " OR ".join(
            ["reward > 1"] * 4_000
        ),  # what a configuration file of the most bytes has room for
    ):
        config = whole.replace('ties = "hash"', f'ties = "hash"\nwhere = "{where}"')
        (stranger / "config.toml").write_text(config, encoding="utf-8")
        begin = time.monotonic()
        match command:
            case ("report",):
                told = quark("report", stranger)
            case ("train",):
                told = quark("train", stranger / "config.toml", "--dry-run")
            case (name, *rest):
                told = quark("pool", name, stranger, *rest)
        assert time.monotonic() - begin < 30
        assert len(told.err) < 2000
        if command == ("report",):
            page = (stranger / "report.html").read_text(encoding="utf-8")
            assert "config.toml does not say how it is ranked: where = " in page
        else:
            assert told.code == 2, told
            assert "where = " in told.err
    assert bait.is_untouched()


@pytest.fixture
def stranger(stranger_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stranger_run, tmp_path / "run")


@pytest.fixture(scope="module")
def stranger_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.cli.commands import TINY_RUN

    run = tmp_path_factory.mktemp("runs") / "run"
    assert quark("train", "--run-dir", run, *TINY_RUN).code == 0
    return run
