"""Other tools read the segments of a pool that is being written, without quark."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from quark.pool.native import NativePool
from tests.pool.batches import VOCAB_SIZE

ROOT = Path(__file__).parents[2]

WRITER = """
import sys, threading
from pathlib import Path
from quark.pool.native import NativePool
from tests.pool.batches import make_batch

stopped = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stopped.set()), daemon=True).start()
with NativePool.open(sys.argv[1], writable=True) as pool:
    number = pool.snapshot.generation
    while not stopped.wait(0.05):  # slow enough that a reader on a busy machine keeps up
        pool.append(make_batch(str(number), {"reward": [number / 8, float("nan"), -1.0]}, content=number))
        number += 1
        if number == 5:
            print("written", flush=True)
"""

READER = """
import json, sys, time
from pathlib import Path

def finished(folder):
    # A file that may still be written is not whole yet. Appends are numbered: while they go on, a listing
    # can have one and lack the one before it.
    files = sorted(f for f in folder.glob("*.arrow") if not f.stat().st_mode & 0o222)
    return [f for number, f in enumerate(files, 1) if int(f.stem[-16:], 16) == number]

{read}

folder, seen = Path(sys.argv[1], "segments"), []
while len(seen) < 4:
    rows = read(finished(folder))
    if not seen or rows[0] > seen[-1][0]:
        seen.append(rows)
    time.sleep(0.01)
assert not [name for name in sys.modules if name.startswith("quark")]
print(json.dumps(seen))
"""

READ = {
    "polars": """
import polars as pl
def read(files):
    rows = pl.scan_ipc(files).select(
        pl.len(),
        pl.col("seed").max().alias("seed"),
        pl.col("score:reward").fill_nan(None).sum().alias("reward"),
        pl.col("completion").list.len().sum().alias("tokens"),
        pl.col("completion_text").str.len_chars().sum().alias("text"),
    )
    return list(rows.collect().row(0))
""",
    "pandas": """
import pandas as pd
def read(files):
    rows = pd.concat([pd.read_feather(file) for file in files])
    return [
        len(rows),
        int(rows["seed"].max()),
        float(rows["score:reward"].sum()),
        int(rows["completion"].map(len).sum()),
        int(rows["completion_text"].str.len().sum()),
    ]
""",
    "duckdb": """
import duckdb
import pyarrow.dataset
def read(files):
    segments = pyarrow.dataset.dataset([str(file) for file in files], format="arrow")
    query = '''SELECT count(*), max(seed), sum("score:reward") FILTER (NOT isnan("score:reward")),
                      sum(len(completion)), sum(len(completion_text)) FROM segments'''
    [row] = duckdb.sql(query).fetchall()
    return [float(v) if isinstance(v, float) else int(v) for v in row]
""",
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pool that another process appends to until the tests are over."""
    path = tmp_path_factory.mktemp("live") / "pool"
    NativePool.create(path, vocab_size=VOCAB_SIZE).close()
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    with writer.stdout, writer.stdin:
        assert writer.stdout.readline() == b"written\n"
        yield path
        assert writer.poll() is None, "the writer was to write all the time"
    assert writer.wait(timeout=60) == 0


@pytest.mark.parametrize("tool", READ)
def test_a_tool_reads_a_pool_that_grows(live: Path, tool: str, tmp_path: Path) -> None:
    for module in {"duckdb": ["duckdb", "pyarrow"], "pandas": ["pandas", "pyarrow"]}.get(tool, []):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", READER.format(read=READ[tool]), str(live)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    with NativePool.open(live) as pool:
        while len(pool) < seen[-1][0]:  # the newest segment that was read may not be committed yet
            time.sleep(0.01)
            pool.refresh()
        samples = pool.samples(range(seen[-1][0]))
    assert [rows[0] for rows in seen] == sorted({rows[0] for rows in seen})
    for num_rows, seed, reward, tokens, text in seen:
        first = samples[:num_rows]
        assert num_rows % 3 == 0
        assert seed == max(sample.seed for sample in first)
        rewards = np.array([sample.scores["reward"] for sample in first])
        assert reward == pytest.approx(np.nansum(rewards), rel=1e-5)
        assert tokens == sum(len(sample.completion_tokens) for sample in first)
        assert text == sum(len(sample.completion_text or "") for sample in first)
