"""Appends rows from an exported file, or from other pools.

Rows with the same idempotency key become one append, so an interrupted import can be repeated: samples that the pool
already has under their key are left alone. Different samples under a known key are refused if they come from a file,
and get a new key if they come from a pool.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from quark.errors import ConfigError, DataError
from quark.pool.base import PromptColumns, Sample, SampleBatch
from quark.pool.info import PoolSettings
from quark.pool.native import NativePool
from quark.pool.rows import (
    TAKEN,
    Rows,
    first_true,
    rows_of_file,
    rows_of_pool,
    settings_of_file,
    shown,
)
from quark.pool.sample_columns import BATCH_COLUMNS, FLOAT_COLUMNS
from quark.pool.scan import SCORE_PREFIX

_OF_APPEND = ("round", "chunk", "policy_step", "settings")
"""Columns that have one value for all samples of a key."""
_DIGEST_MARK = "#"
"""Separates the key of another pool's samples from the digest that makes it unique."""
_COMPARED = tuple(name for name in TAKEN if name not in (*FLOAT_COLUMNS, "key"))
"""Columns that identify a sample, without ids and scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """Result of an import."""

    num_appended: int
    """Number of samples appended."""
    num_known: int
    """Number of samples that the pool has, or had before they were removed, under the same key."""


def import_file(path: Path, file: Path, *, vocab_size: int | None = None) -> Ingested:
    """Append the samples of a file from ``export_pool`` to the pool at ``path``, or to a new pool there.

    When this returns, they survive a power cut. A score column that some samples lack holds NaN for them. All other
    values stay the same. Samples and prompts get new ids, the samples in the order of the file.

    Args:
        path: The pool. A missing path or an empty directory becomes a new pool.
        file: Parquet, JSON lines or Arrow IPC.
        vocab_size: Vocabulary of a new pool. None takes it from a Parquet file.

    Raises:
        DataError: The file cannot be read, holds an invalid sample, or has other samples or scores under a key of
            the pool. Names file, row and column. The rows before it are in the pool.
        ConfigError: The vocabulary size of a new pool is unknown or invalid, an existing pool has another one, or
            the suffix of the file does not name a format.
        FileNotFoundError: The directory for a new pool does not exist.
        PoolError: An error of the pool. A new pool is removed again if no sample was appended, except after a kill.
    """
    if vocab_size is not None and not 0 < vocab_size < 2**32:
        raise ConfigError(f"--vocab-size is {vocab_size}; it must be at least 1 and below 2**32")
    all_rows = rows_of_file(file)
    first = next(all_rows, None)
    settings = settings_of_file(file)
    with ExitStack() as opened:
        pool = _opened_or_created(opened, path, file, vocab_size, settings, first)
        return _append_all(pool, () if first is None else chain([first], all_rows))


def merge_pools(
    into: Path, sources: Sequence[Path], *, is_same_tokenizer: bool = False
) -> list[Ingested]:
    """Append the samples of other pools to the pool at ``into``, or to a new pool there. One result per source.

    Samples keep their keys, so merging a pool with its copy adds nothing. If two pools have different samples under
    one key, those of the source get the key ``<key>#<digest of their content>``.

    Args:
        into: The pool to write.
        sources: The pools to read, each at its newest snapshot.
        is_same_tokenizer: Whether to merge pools of models with different names.

    Raises:
        ConfigError: The pools do not fit together. Nothing is written.
        FileNotFoundError: A source, or the directory for a new pool, does not exist.
        PoolError: An error of a pool. A new pool is removed again if no sample was appended, except after a kill.
    """
    with ExitStack() as opened:
        pools = [opened.enter_context(NativePool.open(source)) for source in sources]
        if _is_there(into):
            target = opened.enter_context(NativePool.open(into, writable=True))
            _refuse_misfits([target, *pools], is_same_tokenizer)
        else:
            _refuse_misfits(pools, is_same_tokenizer)
            target = _created_like(opened, into, pools)
        return [_append_all(target, rows_of_pool(pool), is_renaming=True) for pool in pools]


def _append_all(
    pool: NativePool, all_rows: Iterable[Rows], *, is_renaming: bool = False
) -> Ingested:
    """Append rows, key by key. With ``is_renaming``, different samples under a known key get a new key."""
    appended = known = 0
    done: set[str] = set()
    for rows in _by_key(all_rows):
        key = str(rows.frame["key"][0])
        if key in done:
            raise rows.error(0, "key", f"{key!r} came before; the rows of a key must be together")
        done.add(key)
        _refuse_texts(rows, store_text=pool.settings.store_text)
        if is_renaming:
            key, ids = _whereabouts(pool, rows)
        else:
            ids = pool.find(key)
            if ids is not None:
                _refuse_others(pool, ids, rows)
        if ids is None:
            batch = dataclasses.replace(batch_of(rows, pool.settings), key=key)
            try:
                pool.append(batch)
            except ValueError as error:
                last = rows.first + rows.frame.height - 1
                raise DataError(f"{rows.source}: rows {rows.first} to {last}: {error}") from error
            appended += rows.frame.height
        else:
            known += len(ids)
    return Ingested(num_appended=appended, num_known=known)


def _by_key(all_rows: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows, grouped by key."""
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


def _refuse_texts(rows: Rows, *, store_text: bool) -> None:
    column = "completion_text"
    texts = rows.frame[column]
    if store_text and (row := first_true(texts.is_null())) is not None:
        raise rows.error(
            row,
            column,
            "missing, where the pool or other rows have it: give all samples one, or none",
        )
    if not store_text and (row := first_true(texts.is_not_null())) is not None:
        raise rows.error(
            row, column, "the pool keeps no texts: set them to null, or import into another pool"
        )


def _refuse_others(pool: NativePool, ids: range, rows: Rows) -> None:
    """Raises DataError if the rows differ from the samples that the pool has, or had, under their key.

    Numbers that the rows lack, or that were removed with the samples, are not compared.
    """
    frame = rows.frame
    key = frame["key"][0]
    if len(ids) != frame.height:
        what = f"{key!r} is in the pool with {len(ids)} samples, here it has {frame.height}"
        raise rows.error(0, "key", what)
    numbers = [name for name in frame.columns if name not in (*_COMPARED, "key")]
    samples = _stored(pool, ids) or ()
    for row, (sample, given) in enumerate(zip(samples, frame.iter_rows(named=True), strict=False)):
        names = list(_COMPARED)
        if sample.id >= pool.num_removed:
            names += (name for name in numbers if given[name] is not None)
        for name in names:
            theirs = _value(sample, name)
            if theirs != given[name]:
                way_out = (
                    "leave the number out" if name in numbers else "give these samples another key"
                )
                raise rows.error(
                    row,
                    name,
                    f"{shown(given[name])} here and {shown(theirs)} in the pool, both under {key!r}; an import "
                    f"changes nothing that is there: {way_out}, or import into a new pool",
                )


def batch_of(rows: Rows, settings: PoolSettings) -> SampleBatch:
    """The rows of one key as an append.

    Raises:
        DataError: a token is outside the vocabulary, or rows differ in a value that an append has once. Names the row.
    """
    frame = rows.frame
    for name in _OF_APPEND:
        if (row := first_true(frame[name] != frame[name][0])) is not None:
            raise rows.error(row, name, "not what the row before it with the same key has")
    for name in ("prompt_tokens", "completion_tokens"):
        largest = frame[name].list.max()
        if (row := first_true(largest >= settings.vocab_size)) is not None:
            what = f"token {largest[row]} is outside the vocabulary of {settings.vocab_size}"
            raise rows.error(row, name, what)
    prompts: dict[tuple[tuple[int, ...], str, str], int] = {}
    prompt_index = [
        prompts.setdefault((tuple(tokens), text, metadata), len(prompts))
        for tokens, text, metadata in frame.select(
            "prompt_tokens", "prompt_text", "prompt_metadata"
        ).iter_rows()
    ]
    tokens, texts, metadata = zip(*prompts, strict=True)
    offsets = np.zeros(frame.height + 1, np.int64)
    np.cumsum(frame["completion_tokens"].list.len().to_numpy(), out=offsets[1:])
    return SampleBatch(
        key=frame["key"][0],
        prompts=PromptColumns(
            token_ids=np.fromiter(chain.from_iterable(tokens), np.uint32),
            offsets=np.cumsum([0, *map(len, tokens)]),
            texts=texts,
            metadata=metadata,
        ),
        prompt_index=np.array(prompt_index, np.uint32),
        # An empty list explodes to a null.
        completion_tokens=frame["completion_tokens"].explode().drop_nulls().to_numpy(),
        completion_offsets=offsets,
        completion_texts=frame["completion_text"].to_list() if settings.store_text else None,
        round=frame["round"][0],
        chunk=frame["chunk"][0],
        policy_step=frame["policy_step"][0],
        settings=frame["settings"][0],
        scores={
            name.removeprefix(SCORE_PREFIX): _filled(frame[name], np.nan)
            for name in frame.columns
            if name not in TAKEN
        },
        **{column.given: _filled(frame[column.name], column.blank) for column in BATCH_COLUMNS},
    )


def _filled(column: pl.Series, blank: float) -> NDArray[Any]:
    return column.fill_null(blank).to_numpy()


def _whereabouts(pool: NativePool, rows: Rows) -> tuple[str, range | None]:
    """The key under which ``pool`` has the rows of one key, or will get them; and their ids if it has them."""
    key = str(rows.frame["key"][0])
    if pool.find(key) is None and _DIGEST_MARK not in key:
        return key, None
    content = [list(row) for row in rows.frame.select(_COMPARED).iter_rows()]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    marked = _DIGEST_MARK + digest
    for name in (key, key + marked, key.removesuffix(marked)):
        ids = pool.find(name)
        if ids is not None and _is_alike(pool, ids, content):
            return name, ids
    return (key if pool.find(key) is None else key + marked), None


def _is_alike(pool: NativePool, ids: range, content: list[list[Any]]) -> bool:
    """Whether samples have this content. If no snapshot shows them, only their number is compared."""
    samples = _stored(pool, ids)
    if samples is None:
        return len(ids) == len(content)
    return [[_value(sample, name) for name in _COMPARED] for sample in samples] == content


def _stored(pool: NativePool, ids: range) -> list[Sample] | None:
    """Samples, from an older snapshot if they were removed; None if no snapshot shows them."""
    if ids.start >= pool.num_removed:
        return pool.samples(ids)

    def size_at(generation: int) -> int:
        with NativePool.open(pool.path, snapshot=generation) as then:
            return len(then)

    generations = range(pool.oldest_generation, pool.snapshot.generation)
    found = generations.start + bisect_left(generations, ids.stop, key=size_at)
    with NativePool.open(pool.path, snapshot=found) as then:
        return then.samples(ids) if ids.start >= then.num_removed else None


def _value(sample: Sample, name: str) -> object:
    """The value of a sample in a column of a scan; None for a score column that the pool lacks."""
    if name not in TAKEN:
        return sample.scores.get(name.removeprefix(SCORE_PREFIX))
    value = getattr(sample, name)
    return value.tolist() if isinstance(value, np.ndarray) else value


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


def _created_like(opened: ExitStack, path: Path, pools: Sequence[NativePool]) -> NativePool:
    """A new pool with the common settings of some pools."""
    settings = pools[0].settings
    others = [pool.settings.metadata for pool in pools[1:]]
    common = {
        name: value
        for name, value in settings.metadata.items()
        if all(name in other and other[name] == value for other in others)
    }
    return _created(
        opened,
        path,
        vocab_size=settings.vocab_size,
        store_text=settings.store_text,
        tie_seed=settings.tie_seed,
        metadata=common,
    )


def _opened_or_created(
    opened: ExitStack,
    path: Path,
    file: Path,
    vocab_size: int | None,
    settings: Mapping[str, Any],
    first: Rows | None,
) -> NativePool:
    stated = vocab_size or settings.get("vocab_size")
    if _is_there(path):
        pool = opened.enter_context(NativePool.open(path, writable=True))
        if stated not in (None, pool.settings.vocab_size):
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
        return _created(
            opened,
            path,
            vocab_size=stated,
            store_text=settings.get("store_text", has_text),
            tie_seed=settings.get("tie_seed", 0),
            metadata=settings.get("metadata"),
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: its settings make no pool: {error}") from error


def _created(opened: ExitStack, path: Path, **settings: Any) -> NativePool:  # noqa: ANN401 - see create
    """A new pool, which is removed again if an error leaves it empty."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent}")
    before = set(path.rglob("*")) if path.exists() else None
    pool = opened.enter_context(NativePool.create(path, **settings))
    made = sorted(set(path.rglob("*")) - (before or set()), reverse=True)  # entries before folders
    if before is None:
        made.append(path)

    def undo(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or len(pool):
            return
        for entry in made:
            with suppress(OSError):  # report the original error
                entry.rmdir() if entry.is_dir() else entry.unlink()

    opened.push(undo)  # runs before the lock is released
    return pool


def _is_there(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))
