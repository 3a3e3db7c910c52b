"""Tokens in one padded u16 matrix and `np.take(out=)`: the fastest gather a NumPy user can have."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pool.data import COMPLETION_WIDTH, PROMPT_WIDTH, Rows
from pool.peer import Batches, Strata, kept_order
from pool.peers.numpy_ragged import RawFiles


class NumpyPadded(RawFiles):
    """120 bytes of tokens a sample, whatever their number."""

    name = "padded"
    columns: ClassVar = {
        "matrix": np.uint16,
        "prompt_lengths": np.uint8,
        "lengths": np.uint8,
        "rewards": np.float32,
        "prompt_index": np.uint32,
        "round": np.uint32,
        "policy_step": np.uint32,
    }

    def encode(self, rows: Rows) -> dict[str, NDArray[np.generic]]:
        constant = np.full(len(rows), rows.number, np.uint32)
        return {
            "matrix": rows.matrix(),
            "prompt_lengths": rows.prompt_lengths.astype(np.uint8),
            "lengths": rows.lengths.astype(np.uint8),
            "rewards": rows.rewards,
            "prompt_index": rows.prompt_index,
            "round": constant,
            "policy_step": constant,
        }

    def batches(self, batch_size: int) -> Batches:
        strata = Strata(kept_order(self.folder), batch_size)
        matrix = self.map("matrix").reshape(-1, PROMPT_WIDTH + COMPLETION_WIDTH)
        out = np.empty((batch_size, matrix.shape[1]), np.uint16)

        def batch(step: int) -> object:
            del step
            # Without a mode NumPy takes through a buffer of its own, to be able to undo.
            np.take(matrix, strata.draw(), axis=0, out=out, mode="clip")
            prompts, rows = out[:, :PROMPT_WIDTH], out[:, PROMPT_WIDTH:]
            return prompts.astype(np.int64), rows.astype(np.int64), strata.labels

        return batch
