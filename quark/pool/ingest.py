"""Rows into a pool: from a file that was exported, or from other pools.

The rows of one idempotency key become one append again, so that whatever was interrupted can be done
again: keys that are there are left alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from quark.errors import ConfigError, DataError
from quark.pool.base import PromptRecord, Sample, SampleBatch
from quark.pool.native import NativePool
from quark.pool.rows import TAKEN, Rows, first_true, rows_of_file, rows_of_pool, settings_of_file
from quark.pool.scan import SCORE_PREFIX

_OF_APPEND = ("round", "chunk", "policy_step", "settings")
"""Columns that have one value for all samples of a key."""
_DIGEST_MARK = "#"
"""Between a key that another pool's samples have, and the digest of those that had to give way."""
_NOT_COMPARED = ("id", "prompt_id", "logprob_policy", "logprob_reference", "scores")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """What became of the rows."""

    num_appended: int
    """Samples that came to the pool."""
    num_known: int
    """Samples that were there, or had been before they were removed, under the same key."""


def import_file(path: Path, file: Path, *, vocab_size: int | None = None) -> Ingested:
    """Append the samples of a file that ``export_pool`` wrote to the pool at ``path``, or to a new one there.

    On return they survive a power cut. A score column that some samples lack holds NaN for them; otherwise
    they come out as they went in; samples and prompts get new ids, the samples in the order of the file.

    Args:
        path: The pool; nothing, or an empty directory, to make one.
        file: Parquet, JSON lines or Arrow IPC.
        vocab_size: Of a new pool. None takes it from the file, where that is Parquet.

    Raises:
        DataError: The file cannot be read or holds what is no sample; names file, row and column. What came
            before that row is in the pool.
        ConfigError: The vocabulary of a new pool is not known, that of an old one is another, or the file's
            name does not say its format.
        PoolError: Of the pool.
    """
    all_rows = rows_of_file(file)
    first = next(all_rows, None)
    settings = settings_of_file(file)
    with _opened_or_created(path, file, vocab_size, settings, first) as pool:
        return _append_all(pool, () if first is None else chain([first], all_rows))


def merge_pools(
    into: Path, sources: Sequence[Path], *, is_same_tokenizer: bool = False
) -> list[Ingested]:
    """Append the samples of other pools to the pool at ``into``, or to a new one there; one result per source.

    Samples keep their keys, so that a pool and its copy have nothing to give each other. Where two pools have
    different samples under one key, those of the source come under ``<key>#<digest of their content>``.

    Args:
        into: The pool to write.
        sources: Pools to read, each at its newest snapshot.
        is_same_tokenizer: Whether pools that were sampled from differently named models may be merged.

    Raises:
        ConfigError: The pools do not fit together; nothing is written.
        PoolError: Of the pools.
    """
    with ExitStack() as opened:
        pools = [opened.enter_context(NativePool.open(source)) for source in sources]
        if _is_there(into):
            target = opened.enter_context(NativePool.open(into, writable=True))
            _refuse_misfits([target, *pools], is_same_tokenizer)
        else:
            _refuse_misfits(pools, is_same_tokenizer)
            target = opened.enter_context(_created_like(into, pools))
        return [_append_all(target, rows_of_pool(pool), of=pool) for pool in pools]


def _append_all(
    pool: NativePool, all_rows: Iterable[Rows], of: NativePool | None = None
) -> Ingested:
    """Append rows, key by key; ``of`` is the pool that they come from."""
    appended = known = 0
    done: set[str] = set()
    for rows in _by_key(all_rows):
        key = str(rows.frame["key"][0])
        if key in done:
            raise rows.error(0, "key", f"{key!r} came before; the rows of a key must be together")
        done.add(key)
        ids = pool.find(key)
        if of is not None:
            key, ids = _whereabouts(pool, of, key)
        if ids is None:
            batch = dataclasses.replace(_batch(rows, pool.settings.vocab_size), key=key)
            try:
                pool.append(batch)
            except ValueError as error:
                last = rows.first + rows.frame.height - 1
                raise DataError(f"{rows.source}: rows {rows.first} to {last}: {error}") from error
            appended += rows.frame.height
        elif len(ids) == rows.frame.height:
            known += len(ids)
        else:
            raise rows.error(
                0,
                "key",
                f"{key!r} is in the pool with {len(ids)} samples, here it has {rows.frame.height}",
            )
    return Ingested(num_appended=appended, num_known=known)


def _by_key(all_rows: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows, those of one key together."""
    rest: Rows | None = None
    for rows in all_rows:
        if rest is not None:
            rows = Rows(rows.source, rest.first, pl.concat([rest.frame, rows.frame]))
        keys = rows.frame["key"]
        starts = [0, *(keys != keys.shift(1)).arg_true()]
        for start, stop in pairwise(starts):
            yield Rows(rows.source, rows.first + start, rows.frame[start:stop])
        last = starts[-1]
        rest = Rows(rows.source, rows.first + last, rows.frame[last:])
    if rest is not None and rest.frame.height:
        yield rest


def _batch(rows: Rows, vocab_size: int) -> SampleBatch:
    """The append that rows of one key were."""
    frame = rows.frame
    for name in _OF_APPEND:
        if (row := first_true(frame[name] != frame[name][0])) is not None:
            raise rows.error(row, name, "not what the row before it with the same key has")
    for name in ("prompt_tokens", "completion_tokens"):
        largest = frame[name].list.max()
        if (row := first_true(largest >= vocab_size)) is not None:
            what = f"token {largest[row]} is outside the vocabulary of {vocab_size}"
            raise rows.error(row, name, what)
    prompts: dict[tuple[tuple[int, ...], str, str], int] = {}
    prompt_index = [
        prompts.setdefault((tuple(tokens), text, metadata), len(prompts))
        for tokens, text, metadata in frame.select(
            "prompt_tokens", "prompt_text", "prompt_metadata"
        ).iter_rows()
    ]
    texts = frame["completion_text"]
    has_text = texts.null_count() < frame.height
    if has_text and (row := first_true(texts.is_null())) is not None:
        raise rows.error(row, "completion_text", "missing, where other rows have it")
    offsets = np.zeros(frame.height + 1, np.int64)
    np.cumsum(frame["completion_tokens"].list.len().to_numpy(), out=offsets[1:])
    return SampleBatch(
        key=frame["key"][0],
        prompts=[
            PromptRecord(token_ids=np.array(tokens, np.uint32), text=text, metadata=metadata)
            for tokens, text, metadata in prompts
        ],
        prompt_index=np.array(prompt_index, np.uint32),
        # An empty list explodes to a null.
        completion_tokens=frame["completion_tokens"].explode().drop_nulls().to_numpy(),
        completion_offsets=offsets,
        completion_texts=texts.to_list() if has_text else None,
        finish_reasons=frame["finish_reason"].to_numpy(),
        round=frame["round"][0],
        chunk=frame["chunk"][0],
        policy_step=frame["policy_step"][0],
        reward_tokens=frame["reward_token"].to_numpy(),
        settings=frame["settings"][0],
        seeds=frame["seed"].to_numpy(),
        logprob_policy=_with_nan(frame["logprob_policy"]),
        logprob_reference=_with_nan(frame["logprob_reference"]),
        scores={
            name.removeprefix(SCORE_PREFIX): _with_nan(frame[name])
            for name in frame.columns
            if name not in TAKEN
        },
    )


def _with_nan(column: pl.Series) -> NDArray[np.float32]:
    return column.fill_null(float("nan")).to_numpy()


def _whereabouts(pool: NativePool, of: NativePool, key: str) -> tuple[str, range | None]:
    """Under which key ``pool`` has, or is to get, what ``of`` has under ``key``; the ids if it has it."""
    if pool.find(key) is None and _DIGEST_MARK not in key:
        return key, None
    content = _content(of, of.find(key))
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    marked = _DIGEST_MARK + digest
    for name in (key, key + marked, key.removesuffix(marked)):
        ids = pool.find(name)
        if ids is not None and _is_alike(pool, ids, content):
            return name, ids
    return (key if pool.find(key) is None else key + marked), None


def _is_alike(pool: NativePool, ids: range, content: list[list[Any]]) -> bool:
    """Whether some samples have a content.

    Samples that were removed are compared as long as an older snapshot shows them; then only their number is known.
    """
    if ids.start >= pool.num_removed:
        return _content(pool, ids) == content

    def size_at(generation: int) -> int:
        with NativePool.open(pool.path, snapshot=generation) as then:
            return len(then)

    generations = range(pool.oldest_generation, pool.snapshot.generation)
    found = generations.start + bisect_left(generations, ids.stop, key=size_at)
    with NativePool.open(pool.path, snapshot=found) as then:
        if ids.start >= then.num_removed:
            return _content(then, ids) == content
    return len(ids) == len(content)


def _content(pool: NativePool, ids: range | None) -> list[list[Any]]:
    """What samples are, however they are numbered and scored."""
    names = [f.name for f in dataclasses.fields(Sample) if f.name not in _NOT_COMPARED]
    rows = [[getattr(sample, name) for name in names] for sample in pool.samples(ids or ())]
    return [[v.tolist() if isinstance(v, np.ndarray) else v for v in row] for row in rows]


def _refuse_misfits(pools: Sequence[NativePool], is_same_tokenizer: bool) -> None:
    first = pools[0]
    for pool in pools[1:]:
        for what in ("vocab_size", "store_text"):
            ours, theirs = getattr(first.settings, what), getattr(pool.settings, what)
            if ours != theirs:
                raise ConfigError(
                    f"{pool.path} does not fit {first.path}: its {what} is {theirs}, not {ours}"
                )
        models = [p.settings.metadata.get("model") for p in (first, pool)]
        if None not in models and models[0] != models[1] and not is_same_tokenizer:
            raise ConfigError(
                f"{pool.path} was sampled from {models[1]!r}, {first.path} from {models[0]!r}: if their "
                "tokenizers are the same, say so with --same-tokenizer"
            )


def _created_like(path: Path, pools: Sequence[NativePool]) -> NativePool:
    """A new pool with what the settings of some have in common."""
    settings = pools[0].settings
    others = [pool.settings.metadata for pool in pools[1:]]
    common = {
        name: value
        for name, value in settings.metadata.items()
        if all(name in other and other[name] == value for other in others)
    }
    return NativePool.create(
        path,
        vocab_size=settings.vocab_size,
        store_text=settings.store_text,
        tie_seed=settings.tie_seed,
        metadata=common,
    )


def _opened_or_created(
    path: Path,
    file: Path,
    vocab_size: int | None,
    settings: Mapping[str, Any],
    first: Rows | None,
) -> NativePool:
    stated = vocab_size or settings.get("vocab_size")
    if _is_there(path):
        pool = NativePool.open(path, writable=True)
        if stated not in (None, pool.settings.vocab_size):
            pool.close()
            raise ConfigError(
                f"{path} has a vocabulary of {pool.settings.vocab_size} tokens, not of {stated}"
            )
        return pool
    if stated is None:
        raise ConfigError(f"{file} does not say how large its vocabulary is: --vocab-size does")
    has_text = (
        first is not None and first.frame["completion_text"].null_count() < first.frame.height
    )
    try:
        return NativePool.create(
            path,
            vocab_size=stated,
            store_text=settings.get("store_text", has_text),
            tie_seed=settings.get("tie_seed", 0),
            metadata=settings.get("metadata"),
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: its settings make no pool: {error}") from error


def _is_there(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))
