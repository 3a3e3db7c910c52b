"""Arguments that ask for more memory than there is end in an error, never in the end of the process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from quark.pool.base import SampleBatch
from quark.pool.native import NativePool
from tests.cli.commands import ROOT
from tests.pool.batches import VOCAB_SIZE, make_batch

MEGABYTES = 1500
"""Of address space beyond what the process has when it begins."""


def run(path: Path, code: str, *, megabytes: int = MEGABYTES, options: str = "") -> str:
    """What a process prints that does something with a pool, and has little memory."""
    script = f"""
        import resource
        from dataclasses import replace
        import numpy as np
        from quark.pool.native import NativePool
        from quark.pool.scope import Scope
        from quark.selftest.samples import make_batch
        pool = NativePool.open({str(path)!r}{options})
        quantization = pool.quantize(2)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ({megabytes} << 20),) * 2)
        try:
            {code}
        except (ValueError, MemoryError, OverflowError) as error:
            print(type(error).__name__, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done
    return done.stdout


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pools") / "pool"
    with NativePool.create(path, vocab_size=VOCAB_SIZE) as pool:
        pool.append(make_batch("run/0", {"reward": [0.1, 0.5, 0.9, 0.7]}))
    return path


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("quantization.sampler(batch_size=2**40, seed=0).batch(0, pad_id=0)", "batch_size is 1099"),
        ("quantization.sampler(batch_size=2**31, seed=0).batch(0, pad_id=0)", "batch_size is 2147"),
        ("quantization.sampler(batch_size=2**28, seed=0).packed(0)", "batch_size is 268435456"),
        ("quantization.sampler(batch_size=2**28, seed=0).draw(0)", "batch_size is 268435456"),
        (
            "quantization.sampler(batch_size=2**28, seed=0, mode='iid').draw(0)",
            "batch_size is 268435456",
        ),
        (
            "quantization.sampler(batch_size=2**10, seed=0, bucket_window=2**18).draw(0)",
            "bucket_window 262144",
        ),
        (
            "next(quantization.sampler(batch_size=2**28, seed=0).stream(pad_id=0))",
            "batch_size is 268435456",
        ),
        (
            "next(quantization.sampler(batch_size=2**28, seed=0).packed_stream())",
            "batch_size is 268435456",
        ),
        ("pool.gather(np.zeros(2**24, np.uint64), pad_id=0)", "a batch of 16777216 samples"),
        ("pool.gather_packed(np.zeros(2**24, np.uint64))", "a batch of 16777216 samples"),
        ("pool.samples([0] * 2**22)", "4194304 samples with their texts and tokens"),
        ("pool.quantize(2**31)", "num_quantiles"),
        ("pool.quantize(2**31, scope=Scope(min_score=0))", "num_quantiles"),
        ("quantization.sampler(batch_size=4, seed=0).stream(pad_id=0, depth=2**40)", "depth is"),
    ],
)
def test_what_cannot_be_had_is_an_error_that_names_the_argument(
    path: Path, code: str, says: str
) -> None:
    assert says in run(path, code)


def large_batch(key: str, num_samples: int) -> SampleBatch:
    """An append with a megabyte of text in each sample."""
    batch = make_batch(key, {"reward": [0.5] * num_samples})
    return replace(batch, completion_texts=["x" * 2**20] * num_samples)


def test_a_compaction_and_an_append_that_memory_does_not_hold_change_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pool"
    with NativePool.create(path, vocab_size=VOCAB_SIZE) as pool:
        for part in range(2):
            pool.append(large_batch(f"run/{part}", 20))
    found = run(path, "pool.compact()", megabytes=100, options=", writable=True")
    assert found.startswith("MemoryError merging files of 4")
    code = (
        "batch = make_batch('new', {'reward': [0.5] * 40}); "
        "pool.append(replace(batch, completion_texts=['x' * 2**20] * 40))"
    )
    found = run(path, code, megabytes=100, options=", writable=True")
    assert found.startswith("MemoryError an append of 40 samples")
    with NativePool.open(path, writable=True) as pool:
        assert len(pool) == 40
        assert pool.compact().num_commits > 0
