"""Python lists that are sorted and cut anew at every append and copied before sampling.

What the published code of Lu et al. 2022 does, in our words. Its pool holds text; this one holds each text as
the bytes of its token ids, which Python sorts and copies as it does strings and which decode faster than
any tokenizer. Not durable: gone on exit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Self

import numpy as np

from pool.data import (
    COMPLETION_WIDTH,
    NUM_QUANTILES,
    PROMPT_WIDTH,
    Rows,
    Workload,
)
from pool.peer import Batches, Peer, Work


class Lists(Peer[tuple[list[bytes], list[bytes], list[float]]]):
    """Prompts, responses and rewards as lists in order of reward."""

    name = "lists"
    promise = "none, lost on exit"
    is_durable = False
    largest = 1_000_000

    def __init__(self, folder: Path, workload: Workload) -> None:
        super().__init__(folder, workload)
        self.prompts: list[bytes] = []
        self.responses: list[bytes] = []
        self.rewards: list[float] = []
        self.labels: list[int] = []

    @classmethod
    def create(cls, folder: Path, workload: Workload, capacity: int) -> Self:
        del capacity
        return cls(folder, workload)

    def encode(self, rows: Rows) -> tuple[list[bytes], list[bytes], list[float]]:
        def cut(tokens: bytes, lengths: np.ndarray) -> list[bytes]:
            ends = itertools.accumulate((2 * lengths).tolist(), initial=0)
            return [tokens[a:b] for a, b in itertools.pairwise(ends)]

        return (
            cut(rows.prompt_tokens.tobytes(), rows.prompt_lengths),
            cut(rows.tokens.tobytes(), rows.lengths),
            rows.rewards.tolist(),
        )

    def append(self, encoded: tuple[list[bytes], list[bytes], list[float]]) -> None:
        prompts, responses, rewards = encoded
        self.prompts.extend(prompts)
        self.responses.extend(responses)
        self.rewards.extend(rewards)

    def _quantize(self) -> None:
        rows = zip(self.prompts, self.responses, self.rewards, strict=True)
        ordered = sorted(rows, key=lambda row: row[-1], reverse=True)
        self.prompts, self.responses, self.rewards = (
            list(column) for column in zip(*ordered, strict=True)
        )
        size = len(ordered) // NUM_QUANTILES
        labels = [label for label in range(NUM_QUANTILES) for _ in range(size)]
        self.labels = labels + [NUM_QUANTILES - 1] * (len(ordered) - len(labels))

    def _ready(self) -> None:
        self._quantize()
        self.view = deepcopy(self.prompts), deepcopy(self.responses), deepcopy(self.labels)

    def quantizers(self) -> Mapping[str, Work]:
        return {"": self._ready}

    def labellers(self) -> Mapping[str, Work]:
        return {"": self._quantize}

    def prepare(self) -> None:
        self._ready()

    def batches(self, batch_size: int) -> Batches:
        prompts, responses, labels = self.view
        shuffled = np.random.default_rng(0).permutation(len(labels)).tolist()

        def batch(step: int) -> object:
            begin = step * batch_size % (len(shuffled) - batch_size)
            chosen = shuffled[begin : begin + batch_size]
            prompt_rows = np.zeros((batch_size, PROMPT_WIDTH), np.int64)
            rows = np.zeros((batch_size, COMPLETION_WIDTH), np.int64)
            for row, i in enumerate(chosen):
                prompt = np.frombuffer(prompts[i], np.uint16)
                prompt_rows[row, PROMPT_WIDTH - len(prompt) :] = prompt
                response = np.frombuffer(responses[i], np.uint16)
                rows[row, : len(response)] = response
            return prompt_rows, rows, np.array([labels[i] for i in chosen])

        return batch
