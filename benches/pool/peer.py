"""What every peer does: the tasks in terms that a store of rows can answer.

Each is written as its own documentation advises, gets what it takes ready-made (`encode` is outside the
clock, except where an interface takes Python rows alone: LMDB, SQLite, lists), and may keep its ranking on
disk for the next opening outside the clock too.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pool.data import NUM_QUANTILES, Rows, Workload

Work = Callable[[], object]
Batches = Callable[[int], object]
"""Step -> int64 prompts [B, 28] left-padded, int64 completions [B, 32] right-padded, labels [B]."""


Encoded = TypeVar("Encoded")
"""A round as a peer takes it."""


class Peer(ABC, Generic[Encoded]):
    """A store of samples under ``folder``."""

    name: ClassVar[str]
    promise: ClassVar[str]
    """What is true of the samples when ``append`` returns."""
    is_durable: ClassVar[bool] = True
    largest: ClassVar[int] = 10_000_000
    """Above this size it is left out, unless it is asked for by name."""

    def __init__(self, folder: Path, workload: Workload) -> None:
        self.folder = folder
        self.workload = workload

    @classmethod
    def create(cls, folder: Path, workload: Workload, capacity: int) -> Self:
        """An empty store; ``capacity`` for those that need to know how much is to come."""
        del capacity
        folder.mkdir(parents=True)
        return cls(folder, workload)

    @classmethod
    def open(cls, folder: Path, workload: Workload) -> Self:
        """What ``create`` and ``append`` left on disk."""
        return cls(folder, workload)

    @abstractmethod
    def encode(self, rows: Rows) -> Encoded:
        """The round as the peer takes it."""

    @abstractmethod
    def append(self, encoded: Encoded) -> None:
        """Store a round, durably if the peer can."""

    @abstractmethod
    def quantizers(self) -> Mapping[str, Work]:
        """Ways to know the quantiles' boundaries after an append: '' is the peer's best, others have names."""

    @abstractmethod
    def labellers(self) -> Mapping[str, Work]:
        """Ways to get the labels of all samples, the boundaries included."""

    @abstractmethod
    def prepare(self) -> None:
        """Whatever sampling needs once after an append, beyond ``quantizers``; kept for ``open``."""

    @abstractmethod
    def batches(self, batch_size: int) -> Batches:
        """Stratified minibatches."""

    def close(self) -> None:
        """Let go of files and maps."""
        self.__dict__.clear()


class Strata:
    """Draws ids from quantiles of a permutation in ranking order: B / K each, with replacement."""

    def __init__(self, order: NDArray[np.unsignedinteger[Any]], batch_size: int) -> None:
        bounds = np.arange(NUM_QUANTILES + 1) * len(order) // NUM_QUANTILES
        self.labels = np.sort(np.arange(batch_size) % NUM_QUANTILES)
        self._order = order
        self._low = bounds[self.labels]
        self._size = (bounds[1:] - bounds[:-1])[self.labels]
        self._rng = np.random.default_rng(0)

    def draw(self) -> NDArray[np.int64]:
        """[B] ids, in the order of ``labels``."""
        places = (self._rng.random(len(self.labels)) * self._size).astype(np.int64)
        return self._order[self._low + places].astype(np.int64)


def boundaries(rewards: NDArray[np.float32]) -> NDArray[np.float32]:
    """The lowest reward of each quantile but the first: sort the values, NumPy's fastest way by far."""
    ordered = np.sort(rewards)
    return ordered[np.arange(1, NUM_QUANTILES) * len(ordered) // NUM_QUANTILES]


def labels_by_boundaries(rewards: NDArray[np.float32], chunk: int = 1 << 16) -> NDArray[np.uint8]:
    """[N] labels by comparing with the boundaries, in chunks that stay in cache."""
    bounds = boundaries(rewards)
    labels = np.zeros(len(rewards), np.uint8)
    for begin in range(0, len(rewards), chunk):
        part, out = rewards[begin : begin + chunk], labels[begin : begin + chunk]
        for bound in bounds:
            out += part >= bound
    return labels


def labels_by_argsort(rewards: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[N] labels by exact ranks."""
    order = np.argsort(rewards)
    labels = np.empty(len(rewards), np.uint8)
    bounds = np.arange(NUM_QUANTILES + 1) * len(order) // NUM_QUANTILES
    for label in range(NUM_QUANTILES):
        labels[order[bounds[label] : bounds[label + 1]]] = label
    return labels


def keep_order(folder: Path, rewards: NDArray[np.float32]) -> None:
    """Store the permutation in ranking order as u32."""
    np.argsort(rewards).astype(np.uint32).tofile(folder / "order")


def kept_order(folder: Path) -> NDArray[np.uint32]:
    """What ``keep_order`` stored."""
    return np.memmap(folder / "order", np.uint32, "r")


def sync(paths: Iterable[Path]) -> None:
    """Fsync files and directories."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def files_of(folder: Path) -> list[Path]:
    """All files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]
