"""Rows into a pool: from a file that was exported, or from other pools.

The rows of one idempotency key become one append again, so that whatever was interrupted can be done
again: keys that are there are left alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from quark.errors import ConfigError, DataError
from quark.pool.base import PromptRecord, Sample, SampleBatch
from quark.pool.export import SETTINGS_KEY, RowFormat
from quark.pool.native import NativePool
from quark.pool.scan import COLUMNS, SCORE_PREFIX

_ROWS_AT_ONCE = 8192
_OWN = ["id", "prompt_id"]
"""Columns of a scan that a pool gives anew."""
_TAKEN = {name: dtype for name, dtype in COLUMNS.items() if name not in _OWN}
_NULLABLE = ("completion_text", "logprob_policy", "logprob_reference")
_OF_APPEND = ("round", "chunk", "policy_step", "settings")
"""Columns that have one value for all samples of a key."""
_RANGES = {
    pl.UInt8(): range(2**8),
    pl.UInt32(): range(2**32),
    pl.UInt64(): range(2**64),
    pl.Int16(): range(-(2**15), 2**15),
}
_NOT_COMPARED = ("id", "prompt_id", "logprob_policy", "logprob_reference", "scores")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """What became of the rows."""

    num_appended: int
    """Samples that came to the pool."""
    num_known: int
    """Samples that were there, under the same key."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one source that lie one after another."""

    source: str
    """What they come from, for messages."""
    first: int
    """Number of the first one, counted from 1."""
    frame: pl.DataFrame
    """``_TAKEN``, then the score columns under their names in a scan."""

    def error(self, row: int, column: str, what: str) -> DataError:
        return DataError(f"{self.source}: row {self.first + row}, column {column}: {what}")


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
    all_rows = _file_rows(file)
    first = next(all_rows, None)
    settings = _file_settings(file)
    with _opened_or_created(path, file, vocab_size, settings, first) as pool:
        return _append_all(pool, () if first is None else _chained(first, all_rows))


def merge_pools(
    into: Path, sources: Sequence[Path], *, is_same_tokenizer: bool = False
) -> list[Ingested]:
    """Append the samples of other pools to the pool at ``into``, or to a new one there; one result per source.

    Samples keep their keys, so that a pool and its copy have nothing to give each other. Where two pools have
    different samples under one key, those of the source come under ``<uuid of the source>/<key>``.

    Args:
        into: The pool to write.
        sources: Pools to read, each at its newest snapshot.
        is_same_tokenizer: Whether pools that were sampled from differently named models may be merged.

    Raises:
        ConfigError: The pools do not fit together; nothing is written.
        PoolError: Of the pools.
    """
    pools = [NativePool.open(source) for source in sources]
    target = NativePool.open(into, writable=True) if _is_there(into) else None
    try:
        _refuse_misfits([*([target] if target else []), *pools], is_same_tokenizer)
        target = target or _created_like(into, pools)
        return [_append_all(target, _pool_rows(pool), of=pool) for pool in pools]
    finally:
        for pool in [*pools, *([target] if target else [])]:
            pool.close()


def _append_all(
    pool: NativePool, all_rows: Iterable[_Rows], of: NativePool | None = None
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
        if ids is not None and of is not None and not _is_same(pool, ids, of, key):
            key = f"{of.settings.uuid}/{key}"
            ids = pool.find(key)
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


def _by_key(all_rows: Iterable[_Rows]) -> Iterator[_Rows]:
    """The same rows, those of one key together."""
    rest: _Rows | None = None
    for rows in all_rows:
        if rest is not None:
            rows = _Rows(rows.source, rest.first, pl.concat([rest.frame, rows.frame]))
        keys = rows.frame["key"]
        starts = [0, *(keys != keys.shift(1)).arg_true()]
        for start, stop in pairwise(starts):
            yield _Rows(rows.source, rows.first + start, rows.frame[start:stop])
        last = starts[-1]
        rest = _Rows(rows.source, rows.first + last, rows.frame[last:])
    if rest is not None and rest.frame.height:
        yield rest


def _batch(rows: _Rows, vocab_size: int) -> SampleBatch:
    """The append that rows of one key were."""
    frame = rows.frame
    for name in _OF_APPEND:
        if (row := _first(frame[name] != frame[name][0])) is not None:
            raise rows.error(row, name, "not what the row before it with the same key has")
    for name in ("prompt_tokens", "completion_tokens"):
        largest = frame[name].list.max()
        if (row := _first(largest >= vocab_size)) is not None:
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
    if has_text and (row := _first(texts.is_null())) is not None:
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
            if name not in _TAKEN
        },
    )


def _first(mask: pl.Series) -> int | None:
    """The first row that is true."""
    rows = mask.arg_true()
    return None if rows.is_empty() else int(rows[0])


def _with_nan(column: pl.Series) -> NDArray[np.float32]:
    return column.fill_null(float("nan")).to_numpy()


def _is_same(pool: NativePool, ids: range, of: NativePool, key: str) -> bool:
    """Whether two pools have the same samples under ``key``, however they are scored."""
    theirs = of.find(key)
    if theirs is None or len(theirs) != len(ids):
        return False
    return [_content(sample) for sample in pool.samples(ids)] == [
        _content(sample) for sample in of.samples(theirs)
    ]


def _content(sample: Sample) -> list[Any]:
    values = [
        getattr(sample, f.name) for f in dataclasses.fields(sample) if f.name not in _NOT_COMPARED
    ]
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in values]


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
    first: _Rows | None,
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


def _chained(first: _Rows, rest: Iterable[_Rows]) -> Iterator[_Rows]:
    yield first
    yield from rest


def _pool_rows(pool: NativePool) -> Iterator[_Rows]:
    first = 1
    for frame in pool.scan().drop(_OWN).collect_batches(chunk_size=_ROWS_AT_ONCE):
        yield _Rows(str(pool.path), first, frame)
        first += frame.height


def _file_settings(file: Path) -> Mapping[str, Any]:
    """Settings of the pool that a Parquet file was exported from; empty where it does not say."""
    if RowFormat.of(file) is not RowFormat.PARQUET:
        return {}
    text = pl.read_parquet_metadata(file).get(SETTINGS_KEY, "{}")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise DataError(f"{file}: its settings of a pool are not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{file}: its settings of a pool are not a JSON object")
    return settings


def _file_rows(file: Path) -> Iterator[_Rows]:
    row_format = RowFormat.of(file)
    if row_format is RowFormat.CSV:
        raise ConfigError(f"{file}: CSV does not hold tokens; import .parquet, .jsonl or .arrow")
    if row_format is RowFormat.JSONL:
        yield from _json_rows(file)
        return
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    scan = pl.scan_parquet if row_format is RowFormat.PARQUET else pl.scan_ipc
    try:
        rows = scan(file, glob=False)
        found = rows.collect_schema()
        _refuse_columns(str(file), found)
        first = 1
        for frame in rows.drop(_OWN, strict=False).collect_batches(chunk_size=_ROWS_AT_ONCE):
            yield _converted(_Rows(str(file), first, frame))
            first += frame.height
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _refuse_columns(source: str, found: Iterable[str]) -> None:
    missing = [name for name in _TAKEN if name not in found]
    if missing:
        raise DataError(f"{source} has no column {', '.join(missing)}")


def _types(names: Iterable[str]) -> dict[str, pl.DataType]:
    """The columns to take and their types: the known ones, and scores under all other names."""
    scores = (name for name in names if name not in COLUMNS)
    return _TAKEN | dict.fromkeys(scores, pl.Float32())


def _converted(rows: _Rows) -> _Rows:
    """Rows with the exact types of a scan. Raises DataError for a value that has none of these."""
    columns = []
    for name, dtype in _types(rows.frame.columns).items():
        given = rows.frame[name]
        if not _is_alike(given.dtype, dtype):
            raise rows.error(0, name, f"it has the type {given.dtype}, not {dtype}")
        column = given.cast(dtype, strict=False)
        bad = column.is_null() & given.is_not_null()
        if isinstance(dtype, pl.List):
            bad |= column.list.eval(pl.element().is_null()).list.any().fill_null(False)
        if dtype.is_float():
            column = column.fill_nan(None)
        elif name not in _NULLABLE:
            bad |= column.is_null()
        if (row := _first(bad)) is not None:
            raise rows.error(row, name, f"{_shown(given[row])} is not {dtype}")
        columns.append(column)
    return _Rows(rows.source, rows.first, pl.DataFrame(columns))


def _is_alike(given: pl.DataType, dtype: pl.DataType) -> bool:
    """Whether values of one type may stand for values of the other."""
    if given == pl.Null:
        return True
    if isinstance(given, pl.List) and isinstance(dtype, pl.List):
        return given.inner == pl.Null or given.inner.is_integer()
    return (
        given == dtype
        or (given.is_integer() and dtype.is_numeric())
        or (given.is_float() and dtype.is_float())
    )


def _json_rows(file: Path) -> Iterator[_Rows]:
    types: dict[str, pl.DataType] = {}
    values: dict[str, list[Any]] = {}
    first = 1
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = _json_object(file, number, line)
            if not types:
                _refuse_columns(f"{file}: row 1", row)
                types = _types(row)
                values = {name: [] for name in types}
            for name in row:
                if name not in types and name not in _OWN:
                    raise DataError(f"{file}: row {number}, column {name}: the first row has none")
            for name, dtype in types.items():
                try:
                    values[name].append(_json_value(name, row.get(name), dtype))
                except (ValueError, OverflowError):  # a number too large for a float
                    what = f"{_shown(row.get(name))} is not {dtype}"
                    raise DataError(f"{file}: row {number}, column {name}: {what}") from None
            if number - first + 1 == _ROWS_AT_ONCE:
                yield _Rows(str(file), first, pl.DataFrame(values, schema=types))
                values = {name: [] for name in types}
                first = number + 1
    if values and values["key"]:
        yield _Rows(str(file), first, pl.DataFrame(values, schema=types))


def _json_object(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}: row {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{file}: row {number} is not a JSON object")
    return row


def _json_value(name: str, value: object, dtype: pl.DataType) -> object:
    """A value of JSON as one of ``dtype``. Raises ValueError where it is none."""
    if value is None and (name in _NULLABLE or name not in _TAKEN):
        return None
    if isinstance(dtype, pl.List) and isinstance(value, list):
        return [_whole(item, dtype.inner) for item in value]
    if dtype.is_float() and type(value) in (int, float):
        number = float(value)  # type: ignore[arg-type]
        return None if math.isnan(number) else number
    if dtype == pl.String and isinstance(value, str):
        value.encode()  # half of a surrogate pair is no text
        return value
    return _whole(value, dtype)


def _whole(value: object, dtype: Any) -> int:  # noqa: ANN401 - polars says a type or a class
    if type(value) is not int or value not in _RANGES.get(dtype, range(0)):
        raise ValueError
    return value


def _shown(value: object) -> str:
    """A value for a message, not all of it if it is long."""
    text = repr(value.to_list() if isinstance(value, pl.Series) else value)
    return text if len(text) <= 80 else text[:79] + "…"
