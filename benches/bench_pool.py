"""The sample pool against what a user could write instead: `python benches/bench_pool.py` or `make bench`.

Tasks, at each pool size N: a durable append of one round of 25,000 samples; opening until the first
minibatch; quantizing after the append (ready to sample); stratified minibatches of 128 and 1,024.

Peers, all written here, all doing the same work on the same samples in the same process, in turn:

- `lists`: Python lists that are zipped, sorted and cut again at every append and copied before sampling,
  as the published code of Lu et al. 2022 does. Not durable, gone on exit.
- `numpy`: raw files that are appended to and synced one by one, `np.argsort` for the ranking, ragged
  gather. Durable, not atomic. `values` is its fastest quantizer: sort the values, pick the boundaries.
- `padded`: the same, with tokens in one padded u16 matrix and `np.take(out=)`: the sampling champion.

Every figure is the median of interleaved repetitions; the table gives peer / quark, so above 1 quark is
faster. The machine's own limits (memory copy, sequential write and sync) are measured beside. Absolute
times depend on the machine; the ratios hold.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quark.pool.base import PromptRecord, SampleBatch
from quark.pool.native import NativePool

ROUND = 25_000
VOCABULARY = 50_257
NUM_PROMPTS = 10_000
NUM_QUANTILES = 5
PROMPT_WIDTH, COMPLETION_WIDTH = 28, 32


@dataclass(frozen=True)
class Round:
    """One round of samples as flat arrays: what generation hands over."""

    prompt_index: NDArray[np.uint32]
    tokens: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    rewards: NDArray[np.float32]
    number: int


class Workload:
    """Prompts of 4..28 tokens, completions of 8..32, rewards in [0, 1)."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.prompts = [
            rng.integers(0, VOCABULARY, rng.integers(4, PROMPT_WIDTH + 1), dtype=np.uint32)
            for _ in range(NUM_PROMPTS)
        ]
        self.records = [PromptRecord(token_ids=p, text="") for p in self.prompts]

    def round(self, number: int, size: int = ROUND) -> Round:
        rng = np.random.default_rng(number + 1)
        lengths = rng.integers(8, COMPLETION_WIDTH + 1, size)
        offsets = np.zeros(size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Round(
            prompt_index=rng.integers(0, NUM_PROMPTS, size, dtype=np.uint32),
            tokens=rng.integers(0, VOCABULARY, offsets[-1], dtype=np.uint32),
            offsets=offsets,
            rewards=rng.random(size, dtype=np.float32),
            number=number,
        )


class QuarkPeer:
    """Ours."""

    name = "quark"

    def __init__(self, folder: Path, workload: Workload) -> None:
        self.path = folder / "pool"
        self.workload = workload
        self.pool = NativePool.create(self.path, vocab_size=VOCABULARY, store_text=False)

    def append(self, data: Round) -> None:
        size = len(data.rewards)
        nan = np.full(size, np.nan, np.float32)
        self.pool.append(
            SampleBatch(
                key=f"bench/{data.number}",
                prompts=self.workload.records,
                prompt_index=data.prompt_index,
                completion_tokens=data.tokens,
                completion_offsets=data.offsets,
                completion_texts=None,
                finish_reasons=np.ones(size, np.uint8),
                round=data.number,
                chunk=0,
                policy_step=0,
                reward_tokens=np.full(size, -1, np.int16),
                settings="{}",
                seeds=np.zeros(size, np.uint64),
                logprob_policy=nan,
                logprob_reference=nan,
                scores={"reward": data.rewards},
            )
        )

    def quantize(self) -> None:
        self.quantization = self.pool.quantize(NUM_QUANTILES)

    def prepare(self, batch_size: int) -> None:
        self.sampler = self.quantization.sampler(batch_size=batch_size, seed=0)

    def batch(self, step: int) -> None:
        self.sampler.batch(step, pad_id=0)

    def open_to_first_batch(self) -> None:
        with NativePool.open(self.path) as pool:
            pool.quantize(NUM_QUANTILES).sampler(batch_size=128, seed=0).batch(0, pad_id=0)

    def num_bytes(self) -> int:
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())


class ListsPeer:
    """Python lists, as the published code keeps them."""

    name = "lists"

    def __init__(self, folder: Path, workload: Workload) -> None:
        del folder
        self.workload = workload
        self.prompts: list[list[int]] = []
        self.completions: list[list[int]] = []
        self.rewards: list[float] = []

    def append(self, data: Round) -> None:
        prompts = [self.workload.prompts[i].tolist() for i in data.prompt_index]
        bounds = data.offsets.tolist()
        tokens = data.tokens.tolist()
        self.prompts += prompts
        self.completions += [tokens[a:b] for a, b in itertools.pairwise(bounds)]
        self.rewards += data.rewards.tolist()

    def quantize(self) -> None:
        order = sorted(
            zip(self.prompts, self.completions, self.rewards, strict=True), key=lambda s: -s[2]
        )
        prompts, completions, rewards = (list(column) for column in zip(*order, strict=True))
        self.prompts, self.completions, self.rewards = prompts, completions, rewards
        size = len(order) // NUM_QUANTILES
        self.labels = [min(i // size, NUM_QUANTILES - 1) for i in range(len(order))]

    def prepare(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.view = (self.prompts, self.completions, copy.copy(self.labels))
        self.shuffled = np.random.default_rng(0).permutation(len(self.rewards)).tolist()

    def batch(self, step: int) -> None:
        prompts, completions, labels = self.view
        begin = step * self.batch_size % (len(self.shuffled) - self.batch_size)
        chosen = self.shuffled[begin : begin + self.batch_size]
        prompt_rows = np.zeros((len(chosen), PROMPT_WIDTH), np.int64)
        completion_rows = np.zeros((len(chosen), COMPLETION_WIDTH), np.int64)
        for row, i in enumerate(chosen):
            prompt_rows[row, PROMPT_WIDTH - len(prompts[i]) :] = prompts[i]
            completion_rows[row, : len(completions[i])] = completions[i]
        np.array([labels[i] for i in chosen])


class NumpyPeer:
    """Raw files, argsort, ragged gather."""

    name = "numpy"
    columns = ("prompt", "tokens", "lengths", "rewards")

    def __init__(self, folder: Path, workload: Workload) -> None:
        self.folder = folder / self.name
        self.folder.mkdir()
        self.workload = workload
        self.files = {name: (self.folder / name).open("ab") for name in self.columns}
        prompts = workload.prompts
        self.prompt_rows = np.zeros((len(prompts), PROMPT_WIDTH), np.uint16)
        for i, prompt in enumerate(prompts):
            self.prompt_rows[i, PROMPT_WIDTH - len(prompt) :] = prompt
        np.save(self.folder / "prompts.npy", self.prompt_rows)

    def append(self, data: Round) -> None:
        self._write(
            prompt=data.prompt_index,
            tokens=data.tokens.astype(np.uint16),
            lengths=np.diff(data.offsets).astype(np.uint8),
            rewards=data.rewards,
        )

    def _write(self, **columns: NDArray[np.generic]) -> None:
        for name, values in columns.items():
            file = self.files[name]
            file.write(memoryview(np.ascontiguousarray(values)))
            file.flush()
            os.fsync(file.fileno())

    def _map(self, name: str, dtype: type[np.generic]) -> NDArray[np.generic]:
        return np.memmap(self.folder / name, dtype=dtype, mode="r")

    def load(self) -> None:
        self.rewards = self._map("rewards", np.float32)
        self.prompt = self._map("prompt", np.uint32)
        self.tokens = self._map("tokens", np.uint16)
        self.lengths = self._map("lengths", np.uint8)
        self.offsets = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=self.offsets[1:])

    def quantize(self) -> None:
        self.load()
        order = np.argsort(self.rewards)
        self.members = np.array_split(order, NUM_QUANTILES)

    def quantize_by_values(self) -> None:
        rewards = np.memmap(self.folder / "rewards", dtype=np.float32, mode="r")
        ordered = np.sort(rewards)
        bounds = ordered[[k * len(ordered) // NUM_QUANTILES for k in range(1, NUM_QUANTILES)]]
        labels = np.zeros(len(rewards), np.uint8)
        for bound in bounds:
            labels += rewards >= bound

    def prepare(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.rng = np.random.default_rng(0)
        self.prompt_out = np.empty((batch_size, PROMPT_WIDTH), np.uint16)
        self.rows_out = np.empty((batch_size, COMPLETION_WIDTH), np.uint16)

    def draw(self) -> NDArray[np.int64]:
        counts = [len(part) for part in np.array_split(np.arange(self.batch_size), NUM_QUANTILES)]
        return np.concatenate(
            [
                members[self.rng.integers(0, len(members), count)]
                for members, count in zip(self.members, counts, strict=True)
            ]
        )

    def batch(self, step: int) -> None:
        del step
        ids = self.draw()
        np.take(self.prompt_rows, self.prompt[ids], axis=0, out=self.prompt_out).astype(np.int64)
        lengths = self.lengths[ids].astype(np.int64)
        columns = np.arange(COMPLETION_WIDTH)
        mask = columns < lengths[:, None]
        flat = (self.offsets[ids][:, None] + columns)[mask]
        rows = np.zeros((len(ids), COMPLETION_WIDTH), np.int64)
        rows[mask] = self.tokens[flat]

    def open_to_first_batch(self) -> None:
        other = object.__new__(type(self))
        other.folder = self.folder
        other.prompt_rows = np.load(self.folder / "prompts.npy", mmap_mode="r")
        other.quantize()
        other.prepare(128)
        other.batch(0)

    def num_bytes(self) -> int:
        return sum(f.stat().st_size for f in self.folder.iterdir())


class PaddedPeer(NumpyPeer):
    """Completions in one padded u16 matrix."""

    name = "padded"

    def append(self, data: Round) -> None:
        lengths = np.diff(data.offsets)
        rows = np.zeros((len(lengths), COMPLETION_WIDTH), np.uint16)
        rows[np.arange(COMPLETION_WIDTH) < lengths[:, None]] = data.tokens
        self._write(
            prompt=data.prompt_index,
            tokens=rows,
            lengths=lengths.astype(np.uint8),
            rewards=data.rewards,
        )

    def load(self) -> None:
        self.rewards = self._map("rewards", np.float32)
        self.prompt = self._map("prompt", np.uint32)
        self.lengths = self._map("lengths", np.uint8)
        self.rows = self._map("tokens", np.uint16).reshape(-1, COMPLETION_WIDTH)

    def batch(self, step: int) -> None:
        del step
        ids = self.draw()
        np.take(self.prompt_rows, self.prompt[ids], axis=0, out=self.prompt_out).astype(np.int64)
        np.take(self.rows, ids, axis=0, out=self.rows_out).astype(np.int64)
        self.lengths[ids]


def clock(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def interleaved(works: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds by name; the works take turns, so that a slow moment hits all."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            times[name].append(clock(work))
    return {name: statistics.median(values) for name, values in times.items()}


def limits(folder: Path) -> dict[str, float]:
    """Memory copy in GB/s, and seconds to write and sync what one round weighs."""
    source = np.ones(1 << 27, np.uint8)
    target = np.empty_like(source)
    copy_s = min(clock(lambda: np.copyto(target, source)) for _ in range(5))
    payload = os.urandom(2_250_000)

    def publish() -> None:
        path = folder / "limit"
        with path.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        path.unlink()

    publish_s = statistics.median(clock(publish) for _ in range(9))
    return {
        "memory_copy_gb_per_s": len(source) / copy_s / 1e9,
        "write_and_sync_2.25MB_s": publish_s,
    }


def measure(
    size: int, folder: Path, *, repetitions: int, with_lists: bool
) -> dict[str, dict[str, float]]:
    """All tasks at pool size ``size``: task -> peer -> median seconds."""
    workload = Workload()
    folder.mkdir()
    peers: list[QuarkPeer | ListsPeer | NumpyPeer] = [
        QuarkPeer(folder, workload),
        NumpyPeer(folder, workload),
        PaddedPeer(folder, workload),
    ]
    if with_lists:
        peers.append(ListsPeer(folder, workload))
    rounds = size // ROUND
    for number in range(rounds):
        data = workload.round(number)
        for peer in peers:
            peer.append(data)
    results: dict[str, dict[str, float]] = {}
    extra = iter(range(rounds, rounds + repetitions))

    # One append after another, so that every peer's pool grows alike.
    appends: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for number in extra:
        data = workload.round(number)
        for peer in peers:
            appends[peer.name].append(clock(lambda peer=peer, data=data: peer.append(data)))
    results["append 25,000 (durable)"] = {n: statistics.median(v) for n, v in appends.items()}

    works: dict[str, Callable[[], object]] = {peer.name: peer.quantize for peer in peers}
    works["values"] = next(p for p in peers if p.name == "numpy").quantize_by_values
    results["quantize"] = interleaved(works, repetitions)

    for batch_size in (128, 1024):
        for peer in peers:
            peer.prepare(batch_size)
        count = 200 if batch_size == 128 else 50
        works = {
            peer.name: (lambda peer=peer, count=count: [peer.batch(t) for t in range(count)])
            for peer in peers
        }
        for peer in peers:
            peer.batch(0)
        seconds = interleaved(works, repetitions)
        results[f"minibatch B={batch_size}"] = {n: s / count for n, s in seconds.items()}

    works = {p.name: p.open_to_first_batch for p in peers if not isinstance(p, ListsPeer)}
    results["open to first minibatch (warm)"] = interleaved(works, repetitions)
    results["bytes per sample"] = {
        p.name: p.num_bytes() / (size + repetitions * ROUND)
        for p in peers
        if not isinstance(p, ListsPeer)
    }
    return results


def show(size: int, results: dict[str, dict[str, float]]) -> None:
    """Print one table: quark's figure, then peer / quark."""
    print(f"\nN = {size:,}\n")
    names = ["lists", "numpy", "values", "padded"]
    print("| task | quark | " + " | ".join(f"{name} / quark" for name in names) + " |")
    print("| --- " * (len(names) + 2) + "|")
    for task, row in results.items():
        ours = row["quark"]
        figure = f"{ours:.0f} B" if task.startswith("bytes") else f"{ours * 1e3:.3g} ms"
        ratios = [f"{row[name] / ours:.2f}" if name in row else "–" for name in names]
        print(f"| {task} | {figure} | " + " | ".join(ratios) + " |")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--no-lists", action="store_true", help="leave the list pool out (slow)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if min(arguments.sizes) < ROUND:
        parser.error(f"sizes are at least {ROUND}")
    everything: dict[str, object] = {"machine": platform.platform(), "numpy": np.__version__}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as temporary:
        everything["limits"] = bounds = limits(Path(temporary))
        print(", ".join(f"{name} {value:.3g}" for name, value in bounds.items()))
        for size in arguments.sizes:
            results = measure(
                size,
                Path(temporary) / str(size),
                repetitions=arguments.repetitions,
                with_lists=not arguments.no_lists,
            )
            show(size, results)
            everything[str(size)] = results
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
