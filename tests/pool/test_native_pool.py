"""What only the pool on disk promises: its files, its lock, its errors, its neighbours' tools."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from quark import _pool_rs, errors
from quark.errors import PoolCorruptedError
from quark.pool.base import PromptColumns, TieRule
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.scope import Scope
from quark.publication import publish_directory
from tests.pool.batches import VOCAB_SIZE, assert_same_content, filled_alike, make_batch
from tests.pool.forked import child_alive, is_true_in_a_fork


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool"


def filled(path: Path, appends: int = 9) -> NativePool:
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE, metadata={"run": "a"})
    for number in range(appends):
        pool.append(make_batch(f"k{number}", {"reward": [0.5, -1.0, float("nan")]}, content=number))
    return pool


def test_every_data_file_opens_in_polars_and_pyarrow(path: Path) -> None:
    pool = filled(path)
    files = sorted(path.glob("*/*.arrow"))
    assert {file.parent.name for file in files} == {"segments", "prompts", "runs"}
    for file in files:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        table.validate(full=True)
        assert pl.read_ipc(file).height == table.num_rows
    segments = pl.concat([pl.read_ipc(file) for file in sorted(path.glob("segments/*"))])
    np.testing.assert_array_equal(segments["score:reward"].to_numpy(), pool.scores("reward"))
    sample = pool.samples([4])[0]
    assert segments["completion"][4].to_list() == sample.completion_tokens.tolist()
    assert segments["completion_text"][4] == sample.completion_text


def test_a_flipped_byte_is_named_with_file_and_offset(path: Path) -> None:
    filled(path).close()
    victim = sorted(path.glob("segments/*"))[3]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.chmod(0o600)
    victim.write_bytes(data)
    pool = NativePool.open(path)
    with pytest.raises(errors.PoolCorruptedError, match=rf"{victim.name} is damaged at offset \d+"):
        pool.samples(range(len(pool)))
    report = NativePool.verify(path)
    assert not report.is_sound
    assert [problem.file for problem in report.problems] == [f"segments/{victim.name}"]


def test_verification_of_a_sound_pool_reads_every_byte(path: Path) -> None:
    filled(path).close()
    report = NativePool.verify(path)
    assert report.is_sound
    assert (report.generation, report.num_samples) == (9, 27)
    read = sum(f.stat().st_size for f in path.rglob("*") if f.suffix in {".arrow", ".log"})
    assert report.num_bytes == read


def test_published_files_are_read_only(path: Path) -> None:
    filled(path)
    for file in path.glob("*/*.arrow"):
        assert file.stat().st_mode & 0o222 == 0
    assert path.stat().st_mode & 0o077 == 0


def test_info_counts_what_is_there(path: Path) -> None:
    pool = filled(path)
    info = pool.info()
    assert info.metadata == {"run": "a"}
    assert (info.vocab_size, info.store_text, info.snapshot) == (VOCAB_SIZE, True, pool.snapshot)
    assert info.num_segments == 9
    [column] = info.score_columns
    assert (column.num_scored, column.num_unscored, column.num_runs) == (18, 9, 2)
    assert (column.mean, column.min, column.max) == (-0.25, -1.0, 0.5)
    assert info.num_bytes > 9 * 1000


def test_the_second_writer_is_told_who_has_the_pool(path: Path) -> None:
    with filled(path):
        with pytest.raises(errors.PoolLockedError, match=f"locked by pid {os.getpid()} on host"):
            NativePool.open(path, writable=True)
        NativePool.open(path)
    NativePool.open(path, writable=True).close()


def test_the_lock_of_a_dead_writer_is_free(path: Path) -> None:
    filled(path).close()
    code = (
        "import os, sys\nfrom quark.pool.native import NativePool\n"
        "pool = NativePool.open(sys.argv[1], writable=True)\nprint('open', flush=True)\n"
        "sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdin is not None
    with child.stdout, child.stdin:
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(errors.PoolLockedError, match=f"pid {child.pid}"):
            NativePool.open(path, writable=True)
        child.kill()
        child.wait()
    NativePool.open(path, writable=True).close()


def test_a_forked_child_reads_but_does_not_append(path: Path) -> None:
    pool = filled(path)
    child = os.fork()
    if child == 0:
        try:
            assert len(pool.samples([0, 26])) == 2
            with pytest.raises(errors.PoolLockedError, match="forked"):
                pool.append(make_batch("child", {"reward": [1.0]}))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(pool.append(make_batch("parent", {"reward": [1.0]}))) == 1


def test_an_old_snapshot_stays_readable(path: Path) -> None:
    pool = filled(path, appends=2)
    then = pool.snapshot
    before = pool.quantize(2)
    for number in range(20):
        pool.append(make_batch(f"later{number}", {"reward": [9.0, 8.0]}, content=number))
    old = NativePool.open(path, snapshot=then.generation)
    assert old.snapshot == then
    np.testing.assert_array_equal(old.quantize(2).labels(), before.labels())
    assert before.snapshot == then
    assert old.find("later0") is None
    assert old.refresh() == pool.snapshot
    with pytest.raises(ValueError, match="no snapshot 99"):
        NativePool.open(path, snapshot=99)
    with pytest.raises(ValueError, match="only be read"):
        NativePool.open(path, snapshot=1, writable=True)


def test_a_reader_cannot_append_and_a_closed_writer_neither(path: Path) -> None:
    pool = filled(path)
    with pytest.raises(errors.PoolError, match="writable=True"):
        NativePool.open(path).append(make_batch("x", {"reward": [1.0]}))
    pool.close()
    with pytest.raises(errors.PoolError, match="closed"):
        pool.append(make_batch("x", {"reward": [1.0]}))


def test_what_is_not_there_or_in_the_way(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        NativePool.open(path)
    with pytest.raises(FileNotFoundError):
        NativePool.verify(path)
    path.mkdir()
    (path / "precious").touch()
    with pytest.raises(FileExistsError):
        NativePool.create(path, vocab_size=5)
    (path / "precious").unlink()
    NativePool.create(path, vocab_size=5).close()
    with pytest.raises(FileExistsError):
        NativePool.create(path, vocab_size=5)


def test_a_pool_stays_where_it_is_when_the_process_goes_elsewhere(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path.parent / "elsewhere").mkdir()
    monkeypatch.chdir(path.parent)
    with NativePool.create(path.name, vocab_size=VOCAB_SIZE) as pool:
        pool.append(make_batch("a", {"reward": [1.0]}))
    reader, writer = NativePool.open(path.name), NativePool.open(path.name, writable=True)
    monkeypatch.chdir("elsewhere")
    writer.append(make_batch("b", {"reward": [2.0]}))
    assert reader.refresh().num_samples == 2
    assert reader.scores("reward").tolist() == [1.0, 2.0]
    assert reader.scan().collect().height == 2


def test_a_link_in_place_of_a_file_is_refused(path: Path) -> None:
    filled(path).close()
    victim = sorted(path.glob("segments/*"))[0]
    victim.rename(path.parent / "elsewhere")
    victim.symlink_to(path.parent / "elsewhere")
    with pytest.raises(errors.PoolCorruptedError, match=r"segments/seg-.* it is a link"):
        NativePool.open(path).samples([0])


def test_a_link_in_place_of_a_directory_is_refused(path: Path) -> None:
    filled(path).close()
    shutil.copytree(path, path.parent / "other")
    other = {file: file.read_bytes() for file in (path.parent / "other").rglob("*.*")}
    shutil.rmtree(path / "segments")
    (path / "segments").symlink_to(path.parent / "other" / "segments")
    named = "^segments is damaged at offset 0: it is a link"
    with pytest.raises(errors.PoolCorruptedError, match=named):
        NativePool.open(path, writable=True)
    with NativePool.open(path) as pool:
        with pytest.raises(errors.PoolCorruptedError, match=named):
            pool.samples([0])
        with pytest.raises(errors.PoolCorruptedError, match=named):
            pool.scan().collect()
        with pytest.raises(errors.PoolCorruptedError, match=named):
            pool.fork(path.parent / "fork")
    assert not (path.parent / "fork").exists()
    problems = NativePool.verify(path).problems
    assert ("segments", 0) in {(problem.file, problem.offset) for problem in problems}
    assert other == {file: file.read_bytes() for file in (path.parent / "other").rglob("*.*")}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of descriptors")
def test_a_check_without_a_descriptor_says_so(path: Path) -> None:
    filled(path).close()
    script = (
        "import os, resource, sys\n"
        "from quark.pool.native import NativePool\n"
        "NativePool.verify(sys.argv[1])\n"
        "used = len(os.listdir('/dev/fd')) - 1\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))\n"
        "try:\n"
        "    NativePool.verify(sys.argv[1])\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == errno.EMFILE


def test_a_pool_without_text_stores_none(path: Path) -> None:
    pool = NativePool.create(path, vocab_size=100_000, store_text=False)
    pool.append(make_batch("a", {"reward": [1.0, 2.0]}, with_texts=False))
    assert pool.samples([0])[0].completion_text is None
    with pytest.raises(ValueError, match="no text"):
        pool.append(make_batch("b", {"reward": [1.0]}))
    column = pl.read_ipc(next(path.glob("segments/*")))["completion"]
    assert column.dtype == pl.List(pl.UInt32)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt_index", np.array([-1, 0, 0]), "do not fit"),
        ("prompt_index", np.array([0.5, 0, 0]), "type float64"),
        ("seeds", np.zeros((3, 1), np.uint64), "dimensions"),
        ("seeds", np.zeros(2, np.uint64), "seeds is for 2 samples"),
        ("round", -1, "round is -1"),
        ("policy_step", 2**32, "policy_step is"),
        ("settings", "[]", "settings is not one JSON object"),
        ("key", "", "the key has 0 bytes"),
        ("finish_reasons", np.array([0, 2, 3], np.uint8), r"finish_reasons\[2\] is 3"),
        ("reward_tokens", np.array([-1, -2, 0], np.int16), r"reward_tokens\[1\] is -2"),
        ("completion_texts", ["a", "b", "\ud800"], "surrogates"),
        ("completion_texts", None, "completion_texts is missing"),
        ("scores", {"Bad Name": np.zeros(3, np.float32)}, "Bad Name"),
        ("scores", {"reward": np.array(["1", "2", "3"])}, "must be float32"),
        ("scores", {"reward": np.array([1e300, 2.0, 3.0])}, "do not fit into float32"),
    ],
)
def test_a_bad_batch_is_refused_and_leaves_nothing(
    path: Path, field: str, value: object, message: str
) -> None:
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    batch = make_batch("a", {"reward": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match=message):
        pool.append(dataclasses.replace(batch, **{field: value}))
    assert pool.snapshot.generation == 0
    assert not list(path.glob("*/*.arrow"))
    pool.append(batch)


def test_unknown_names_ids_and_counts(path: Path) -> None:
    pool = filled(path)
    with pytest.raises(KeyError, match="it has reward"):
        pool.quantize(5, score="toxicity")
    with pytest.raises(KeyError):
        pool.scores("toxicity")
    with pytest.raises(IndexError, match="sample 27"):
        pool.gather(np.array([27], np.uint64), pad_id=0)
    with pytest.raises(IndexError):
        pool.samples([-1])
    with pytest.raises(ValueError, match="num_quantiles"):
        pool.quantize(0)
    with pytest.raises(TypeError, match="integer"):
        pool.samples([1.5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="combination"):
        pool.quantize(5, score=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ties is 'x'; there are hash"):
        pool.quantize(5, ties="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode is 'x'; there are stratified"):
        pool.quantize(5).sampler(batch_size=1, seed=0, mode="x")  # type: ignore[arg-type]
    quantization = pool.quantize(5)
    with pytest.raises(IndexError):
        quantization.labels_of(np.array([27], np.uint64))
    with pytest.raises(ValueError, match="batch_size"):
        quantization.sampler(batch_size=0, seed=0)
    for quantile in (-1, 5):
        with pytest.raises(ValueError, match="no quantile"):
            quantization.sampler(batch_size=1, seed=0, quantiles=[quantile])
    empty = NativePool.create(path.parent / "empty", vocab_size=5)
    with pytest.raises(KeyError, match="it has none"):
        empty.quantize(5)


def test_a_pool_is_not_pickled(path: Path) -> None:
    with pytest.raises(TypeError, match="open it by its path"):
        pickle.dumps(filled(path))


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("invalid", ValueError),
        ("memory", MemoryError),
        ("unknown_column", KeyError),
        ("unknown_sample", IndexError),
        ("unknown_snapshot", ValueError),
        ("not_found", FileNotFoundError),
        ("exists", FileExistsError),
        ("corrupted", errors.PoolCorruptedError),
        ("version", errors.PoolVersionError),
        ("locked", errors.PoolLockedError),
        ("poisoned", errors.PoolPoisonedError),
        ("read_only", errors.PoolError),
        ("forked", errors.PoolError),
        ("io", PermissionError),
        ("io_other", OSError),
        ("panic", errors.PoolError),
    ],
)
def test_every_error_of_the_core_has_its_exception(kind: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        _pool_rs.raise_for_test(kind)
    assert caught.type is error


def test_a_directory_is_published_whole_and_only_once(tmp_path: Path) -> None:
    staged, final = tmp_path / "staged", tmp_path / "final"
    (staged / "deep").mkdir(parents=True)
    (staged / "deep" / "file").write_text("content")
    publish_directory(staged, final)
    assert (final / "deep" / "file").read_text() == "content"
    assert not staged.exists()
    staged.mkdir()
    with pytest.raises(FileExistsError):
        publish_directory(staged, final)
    with pytest.raises(FileNotFoundError):
        publish_directory(tmp_path / "nothing", tmp_path / "other")
    (staged / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        publish_directory(staged, tmp_path / "other")


@pytest.mark.parametrize(
    ("token_ids", "refusal"),
    [
        (np.array([7, 5], np.uint16), None),
        ([7, 5], None),
        (np.array([7, 0, 5, 0], np.uint32)[::2], None),
        (np.array([7, 5], ">u4"), None),
        (np.array([7, -5]), "token_ids holds values that do not fit into uint32"),
        (np.array([7.0, 5.0]), "token_ids has the type float64; it must be uint32"),
        (np.array([True, False]), "token_ids has the type bool; it must be uint32"),
        (np.array([[7, 5]], np.uint32), "token_ids has 2 dimensions; it must be a vector"),
        (np.array(7, np.uint32), "token_ids has 0 dimensions; it must be a vector"),
    ],
)
def test_prompts_are_taken_by_value_whatever_holds_them(
    path: Path, token_ids: object, refusal: str | None
) -> None:
    batch = make_batch("k", {"reward": [0.5, 0.25]}, content=1)
    odd = dataclasses.replace(batch.prompts[0], token_ids=token_ids)
    batch = dataclasses.replace(batch, prompts=[odd, *batch.prompts[1:]])
    with NativePool.create(path, vocab_size=VOCAB_SIZE) as pool:
        if refusal is not None:
            with pytest.raises(ValueError, match=refusal):
                pool.append(batch)
            return
        pool.append(batch)
        for sample in pool.samples([0, 1]):
            prompt = batch.prompts[batch.prompt_index[sample.id]]
            assert sample.prompt_tokens.tolist() == list(prompt.token_ids)


@pytest.mark.parametrize("has_texts", [True, False])
def test_columns_of_prompts_are_what_the_records_are(path: Path, has_texts: bool) -> None:
    batch = make_batch("k", {"reward": [0.5, 0.25, 0.125]}, content=1)
    offsets = np.cumsum([0, *(len(prompt.token_ids) for prompt in batch.prompts)])
    columns = PromptColumns(
        token_ids=np.concatenate([prompt.token_ids for prompt in batch.prompts]),
        offsets=offsets,
        texts=[prompt.text for prompt in batch.prompts] if has_texts else None,
        metadata=[prompt.metadata for prompt in batch.prompts] if has_texts else None,
    )
    records = columns[:]
    assert len(columns) == len(records) == 3
    assert columns[-1].text == records[2].text
    pool, spec = filled_alike(path, [dataclasses.replace(batch, prompts=columns)])
    by_records = MemoryPool(vocab_size=VOCAB_SIZE)
    by_records.append(dataclasses.replace(batch, prompts=records))
    with pool:
        assert_same_content(pool, spec)
        assert_same_content(pool, by_records)
        # The same prompts again, the other way: they are recognised.
        pool.append(dataclasses.replace(batch, prompts=records, key="other"))
        assert (
            pool.info().num_prompts == len({prompt.text for prompt in batch.prompts})
            or not has_texts
        )
        before, after = (pool.samples(ids) for ids in (range(3), range(3, 6)))
        assert [s.prompt_id for s in before] == [s.prompt_id for s in after]


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"offsets": np.array([0, 2])}, "do not lead from 0 to the 3 token_ids"),
        ({"offsets": np.array([1, 3])}, "do not lead from 0"),
        ({"offsets": np.array([0, 4, 3])}, "do not lead from 0"),
        ({"offsets": np.array([], np.int64)}, "do not lead from 0"),
        ({"texts": ["a"]}, "texts has 1 entries for 2 prompts"),
        ({"metadata": []}, "metadata has 0 entries for 2 prompts"),
    ],
)
def test_columns_of_prompts_that_do_not_fit_each_other_are_refused(
    changed: dict[str, Any], refusal: str
) -> None:
    columns = {"token_ids": np.array([1, 2, 3], np.uint32), "offsets": np.array([0, 2, 3])}
    with pytest.raises(ValueError, match=refusal):
        PromptColumns(**columns | changed)


def computed(pool: NativePool) -> list[object]:
    """What the pool computes with several threads."""
    cuts = [
        pool.quantize(3),
        pool.quantize(3, ties=TieRule.OLDER_FIRST),
        pool.quantize(3, scope=Scope(last_rounds=2)),
        pool.quantize(3, scope=Scope(per_prompt=True)),
    ]
    aged = cuts[0].sampler(batch_size=6, seed=0, age_half_life=1.0).draw(0)[0]
    return [*(cut.labels().tolist() for cut in cuts), aged.tolist(), pool.info().score_columns]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_computes_what_its_parent_does(path: Path) -> None:
    pool = filled(path)
    expected = computed(pool)
    assert is_true_in_a_fork(lambda: computed(pool) == expected)
    assert computed(pool) == expected


def closed_in_the_child(pool: NativePool) -> bool:
    pool.close()
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_the_lock_is_its_owners_to_give_back_whoever_was_forked(path: Path) -> None:
    pool = filled(path)
    assert is_true_in_a_fork(lambda: closed_in_the_child(pool))
    with pytest.raises(errors.PoolLockedError):
        NativePool.open(path, writable=True)
    with child_alive():
        pool.close()
        NativePool.open(path, writable=True).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_forked_in_the_middle_of_an_append_does_not_wait_for_it(path: Path) -> None:
    pool = filled(path)
    is_over = threading.Event()

    def append() -> None:
        for number in itertools.count():
            if is_over.is_set():
                return
            pool.append(make_batch(f"more/{number}", {"reward": [0.5] * 3000}, content=number))

    def is_refused() -> bool:
        with pytest.raises(errors.PoolLockedError, match="forked"):
            pool.append(make_batch("child", {"reward": [1.0]}))
        return closed_in_the_child(pool)

    thread = threading.Thread(target=append)
    thread.start()
    while len(pool) < 10_000:
        time.sleep(0.001)
    are_refused = [is_true_in_a_fork(is_refused) for _ in range(3)]
    is_over.set()
    thread.join()
    assert all(are_refused)


@pytest.mark.parametrize("metadata", ["[" * 100_000 + "]" * 100_000, "nonsense", '{"a": 1e400'])
def test_metadata_that_is_no_readable_json_is_refused_at_the_door_and_named_where_it_is_there(
    tmp_path: Path, metadata: str
) -> None:
    from quark import _pool_rs
    from quark.pool.info import stored_json

    with pytest.raises(ValueError, match="metadata"):
        _pool_rs.Pool.create(
            tmp_path / "pool",
            uuid="0" * 32,
            vocab_size=9,
            store_text=False,
            tie_seed=0,
            metadata=metadata,
            holder="a stranger",
        )
    with pytest.raises(PoolCorruptedError, match="the pool's metadata is "):
        stored_json(metadata, "the pool's metadata")
