"""Turns plain columns into an append. Missing tokens, texts, numbers and keys are filled in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quark.errors import DataError
from quark.pool.base import PromptColumns, SampleBatch
from quark.pool.sample_columns import BATCH_COLUMNS

Columns = Mapping[str, list[Any]]

_OTHER_NAMES = {
    "prompt": "prompt_text",
    "prompts": "prompt_text",
    "completion": "completion_text",
    "completions": "completion_text",
    "prompt_ids": "prompt_tokens",
    "completion_ids": "completion_tokens",
    "metadata": "prompt_metadata",
    "logprobs": "logprob_sampled",
}
"""Short names, and names that other trainers use."""
_KNOWN = (
    *("prompt_text", "prompt_tokens", "prompt_metadata", "completion_text", "completion_tokens"),
    *(column.name for column in BATCH_COLUMNS),
)
"""All other columns are scores."""


class Encoder(Protocol):
    """The part of a tokenizer that an append needs."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Turn a text into token ids."""
        ...


def batch_of(
    columns: Columns,
    *,
    tokenizer: Encoder | None,
    store_text: bool,
    key: str | None,
    round: int,
    chunk: int,
    policy_step: int,
    settings: Mapping[str, Any],
) -> SampleBatch:
    """The append of N samples.

    Args:
        columns: of N values each: ``prompt_text`` and ``completion_text`` (or ``prompt``, ``completion``), or their
            ``..._tokens``; ``prompt_metadata`` (objects), ``finish_reason``, ``reward_token``, ``seed`` and
            ``logprob_...``. Any other column is a score, where None and NaN mean "not scored".
        tokenizer: encodes texts that come without tokens.
        store_text: whether the pool stores texts of completions.
        key: key of the append; None takes a digest of the content.
        round: round of all samples.
        chunk: chunk of all samples.
        policy_step: policy step of all samples.
        settings: sampling settings as one JSON object.

    Raises:
        DataError: a column is missing, or a value does not fit its column. Names both.
    """
    named = {_OTHER_NAMES.get(name, name): values for name, values in columns.items()}
    if len(named) < len(columns):
        raise DataError(f"two of the columns {', '.join(columns)} name the same")
    prompts = _Prompts.of(named, tokenizer)
    completions = _tokens(named, "completion", tokenizer, is_start=False)
    texts = named.get("completion_text")
    if store_text and texts is None:
        raise DataError("there is no column completion_text, and the pool stores texts")
    scores = [name for name in named if name not in _KNOWN]
    said = json.dumps(dict(settings), sort_keys=True, allow_nan=False)
    batch = SampleBatch(
        key=key or "",
        prompts=prompts.columns,
        prompt_index=prompts.index,
        completion_tokens=_flat(completions),
        completion_offsets=_offsets(completions),
        completion_texts=[str(text) for text in texts] if store_text and texts else None,
        round=round,
        chunk=chunk,
        policy_step=policy_step,
        settings=said,
        scores={
            name: _numbers(name, named[name], np.dtype(np.float32), np.nan, len(completions))
            for name in scores
        },
        **{
            column.given: _numbers(
                column.name, named.get(column.name), column.dtype, column.blank, len(completions)
            )
            for column in BATCH_COLUMNS
        },
    )
    return batch if key is not None else _with_key(batch)


class _Prompts:
    """The distinct prompts of an append, and the prompt of each sample."""

    def __init__(self, columns: PromptColumns, index: NDArray[np.uint32]) -> None:
        self.columns = columns
        self.index = index

    @classmethod
    def of(cls, named: Columns, tokenizer: Encoder | None) -> _Prompts:
        tokens = _tokens(named, "prompt", tokenizer, is_start=True)
        texts = named.get("prompt_text") or [""] * len(tokens)
        metadata = [
            _metadata(row, value)
            for row, value in enumerate(named.get("prompt_metadata") or ["{}"] * len(tokens))
        ]
        places: dict[tuple[tuple[int, ...], str, str], int] = {}
        rows = zip(map(tuple, tokens), map(str, texts), metadata, strict=True)
        index = [places.setdefault(row, len(places)) for row in rows]
        distinct = list(places)
        return cls(
            PromptColumns(
                token_ids=_flat([row[0] for row in distinct]),
                offsets=_offsets([row[0] for row in distinct]),
                texts=[row[1] for row in distinct],
                metadata=[row[2] for row in distinct],
            ),
            np.array(index, np.uint32),
        )


def _tokens(
    named: Columns, what: str, tokenizer: Encoder | None, *, is_start: bool
) -> list[Sequence[int]]:
    """Token ids of each prompt or completion; ``is_start`` adds the tokenizer's special tokens."""
    if (given := named.get(f"{what}_tokens")) is not None:
        for row, ids in enumerate(given):
            if not isinstance(ids, list | tuple) or not all(type(i) is int and i >= 0 for i in ids):
                raise DataError(
                    f"row {row}, column {what}_tokens: {str(ids)[:60]} is no list of token ids"
                )
        return given
    texts = named.get(f"{what}_text")
    if texts is None:
        raise DataError(f"there is no column {what}_text or {what}_tokens")
    if tokenizer is None:
        raise DataError(
            f"{what}s come as text, and the pool stores tokens: pass tokenizer=..., or a column {what}_tokens"
        )
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"row {row}, column {what}_text: {str(text)[:60]} is not a text")
    return [tokenizer.encode(text, add_special_tokens=is_start) for text in texts]


def _metadata(row: int, value: object) -> str:
    if value is None:
        return "{}"
    try:
        said = (
            value if isinstance(value, str) else json.dumps(value, sort_keys=True, allow_nan=False)
        )
        if not isinstance(json.loads(said), dict):
            raise ValueError("not an object")
    except (TypeError, ValueError) as err:
        raise DataError(f"row {row}, column prompt_metadata: {err}") from err
    return said


def _numbers(
    name: str,
    values: Sequence[Any] | None,
    dtype: np.dtype[Any],
    missing: float,
    count: int,
) -> NDArray[Any]:
    if values is None:
        return np.full(count, missing, dtype)
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, int | float):
            raise DataError(
                f"row {row}, column {name}: {str(value)[:60]} is not a number, and any column that is not known is "
                "a score"
            )
    try:
        return np.array([missing if value is None else value for value in values]).astype(
            dtype, casting="same_kind" if dtype.kind == "f" else "unsafe"
        )
    except (TypeError, OverflowError) as err:
        raise DataError(f"column {name}: {err}") from err


def _flat(rows: Iterable[Sequence[int]]) -> NDArray[np.uint32]:
    return np.fromiter(chain.from_iterable(rows), np.uint32)


def _offsets(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, rows)], dtype=np.int64)


def _with_key(batch: SampleBatch) -> SampleBatch:
    """``batch`` with a digest of its content as key, so that the same content is appended only once."""
    import dataclasses

    digest = hashlib.sha256()
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if field.name == "prompts":
            value = [value.token_ids, value.offsets, value.texts, value.metadata]
        elif field.name == "scores":
            value = [part for name in sorted(value) for part in (name, value[name])]
        for part in value if isinstance(value, list) else [value]:
            digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
            digest.update(b"\0")
    return dataclasses.replace(batch, key=f"content/{digest.hexdigest()[:32]}")
