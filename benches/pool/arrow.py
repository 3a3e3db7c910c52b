"""Rounds as Arrow tables, and rows of Arrow lists as padded matrices."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pool.data import Rows, left_mask, padded, right_mask


def table(rows: Rows) -> pa.Table:
    """A round: lists of u16, the reward, and its provenance."""

    def lists(tokens: NDArray[np.uint16], lengths: NDArray[np.int64]) -> pa.Array:
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))

    constant = pa.array(np.full(len(rows), rows.number, np.uint32))
    return pa.table(
        {
            "prompt": lists(rows.prompt_tokens, rows.prompt_lengths),
            "response": lists(rows.tokens, rows.lengths),
            "reward": pa.array(rows.rewards),
            "prompt_index": pa.array(rows.prompt_index),
            "round": constant,
            "policy_step": constant,
        }
    )


def padded_batch(taken: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompts left-padded, completions right-padded."""

    def flat(name: str) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
        column = taken.column(name)
        array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        return array.flatten().to_numpy(), np.diff(array.offsets.to_numpy())

    prompt_tokens, prompt_lengths = flat("prompt")
    tokens, lengths = flat("response")
    prompts = padded(prompt_tokens, left_mask(prompt_lengths))
    return prompts, padded(tokens, right_mask(lengths))
