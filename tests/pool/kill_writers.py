"""Kills writers at random moments; run by test_kill.py as a process of its own.

Every writer and every check is a forked child of a process that has never opened a pool itself, so a
trial costs milliseconds. Prints one line of JSON with counts, or raises on the first loss.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from quark.pool.base import PromptRecord, SampleBatch
from quark.pool.native import NativePool

TRIALS_PER_POOL = 20


def batch(number: int) -> SampleBatch:
    """The batch that number ``number`` has, whoever writes it: content is a function of the number."""
    rng = np.random.default_rng(number)
    size = int(rng.integers(1, 40))
    lengths = rng.integers(1, 9, size)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    scores = rng.choice([0.0, 1.0, np.nan, 0.25, -3.0], size).astype(np.float32)
    prompts = [
        PromptRecord(token_ids=np.array([number % 7, i], dtype=np.uint32), text=f"{number % 7}/{i}")
        for i in range(3)
    ]
    return SampleBatch(
        key=f"kill/{number}",
        prompts=prompts,
        prompt_index=rng.integers(0, 3, size).astype(np.uint32),
        completion_tokens=rng.integers(0, 1000, int(offsets[-1])).astype(np.uint32),
        completion_offsets=offsets,
        completion_texts=[f"{number}:{i}" for i in range(size)],
        finish_reasons=np.ones(size, np.uint8),
        round=number,
        chunk=0,
        policy_step=number,
        reward_tokens=np.full(size, -1, np.int16),
        settings="{}",
        seeds=np.arange(size, dtype=np.uint64),
        logprob_policy=np.full(size, np.nan, np.float32),
        logprob_reference=np.full(size, np.nan, np.float32),
        scores={"reward": scores},
    )


def in_child(work) -> None:
    """Run ``work`` in a forked child and raise if it failed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise SystemExit(f"a check failed with status {status}")


def write_until_killed(path: Path, first: int, pipe: int) -> None:
    """Append batch after batch, acknowledging each after ``append`` has returned."""
    with NativePool.open(path, writable=True) as pool:
        number = first
        while True:
            pool.append(batch(number))
            os.write(pipe, number.to_bytes(4, "little"))
            number += 1


def check(path: Path, acknowledged: int, since: int) -> None:
    """Everything acknowledged is there with its exact content, and nothing in pieces.

    Args:
        path: the pool; recovered by opening it for writing.
        acknowledged: batches 0 .. acknowledged-1 were acknowledged.
        since: check content from this batch on.
    """
    with NativePool.open(path, writable=True) as pool:
        committed = pool.snapshot.generation
        # One more than was acknowledged can be there: killed between commit and acknowledgement.
        assert acknowledged <= committed <= acknowledged + 1, (acknowledged, committed)
        rewards = pool.scores("reward") if committed else None
        end = 0
        for number in range(committed):
            ids = pool.find(f"kill/{number}")
            assert ids is not None and ids.start == end, (number, ids, end)
            end = ids.stop
            if number < since:
                continue
            expected = batch(number)
            samples = pool.samples(ids)
            assert len(samples) == len(expected.prompt_index)
            for row, sample in enumerate(samples):
                begin, stop = expected.completion_offsets[row : row + 2]
                assert np.array_equal(
                    sample.completion_tokens, expected.completion_tokens[begin:stop]
                )
                assert sample.completion_text == f"{number}:{row}"
                assert sample.prompt_text == expected.prompts[expected.prompt_index[row]].text
                assert sample.round == number and sample.seed == row
            assert np.array_equal(
                rewards[ids.start : ids.stop], expected.scores["reward"], equal_nan=True
            )
        assert len(pool) == end
    assert NativePool.verify(path).is_sound


def main(trials: int, seed: int) -> None:
    """Run ``trials`` kills and print the counts."""
    random.seed(seed)
    acknowledged_in_all = in_flight = 0
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, trials, TRIALS_PER_POOL):
            path = Path(folder) / f"pool-{start}"

            def create(path=path) -> None:
                NativePool.create(path, vocab_size=1000, tie_seed=start).close()

            in_child(create)
            acknowledged = 0
            for _ in range(min(TRIALS_PER_POOL, trials - start)):
                read_end, write_end = os.pipe()
                child = os.fork()
                if child == 0:
                    try:
                        write_until_killed(path, acknowledged, write_end)
                    except BaseException as error:
                        print(f"writer: {error}", file=sys.stderr, flush=True)
                    os._exit(1)
                os.close(write_end)
                if random.random() < 0.8:
                    # Let it get going; otherwise it is killed while it opens and recovers.
                    select.select([read_end], [], [], 10)
                time.sleep(random.uniform(0.0, 0.02))
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                assert os.WIFSIGNALED(status), "the writer ended by itself"
                data = b""
                while part := os.read(read_end, 1 << 16):
                    data += part
                os.close(read_end)
                before = acknowledged
                acknowledged += len(data) // 4

                def recover(path=path, acknowledged=acknowledged, before=before) -> None:
                    check(path, acknowledged, before - 2)

                in_child(recover)
                reader, writer = os.pipe()

                def count(path=path, writer=writer) -> None:
                    with NativePool.open(path) as pool:
                        os.write(writer, pool.snapshot.generation.to_bytes(4, "little"))

                in_child(count)
                committed = int.from_bytes(os.read(reader, 4), "little")
                os.close(reader)
                os.close(writer)
                in_flight += committed - acknowledged
                acknowledged_in_all += acknowledged - before
                acknowledged = committed
    print(json.dumps({"kills": trials, "acknowledged": acknowledged_in_all, "in_flight": in_flight}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
