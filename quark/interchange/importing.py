"""Imports files of other tools into a pool. Each row is imported once, even if its file is imported again.

A digest of its content identifies a row. The pool stores it as the sample's ``seed``. The digest includes a count for
repeated rows, so that equal samples of one step are all kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl

from quark.errors import ConfigError, DataError
from quark.formats import plain_json
from quark.interchange.inspect_logs import samples_of_log
from quark.interchange.layouts import (
    MAX_SCORE_COLUMNS,
    ForeignSample,
    Layout,
    Reader,
    added,
    recognize,
)
from quark.interchange.records import ENDINGS, first_columns, records_of
from quark.interchange.sample_tokens import (
    MAX_SAMPLE_METADATA,
    SampleTokens,
    TokenizedSample,
    Tokenizer,
)
from quark.pool.base import PromptColumns, SampleBatch
from quark.pool.columns import REWARD_COLUMN, column_name
from quark.pool.native import NativePool
from quark.types import Json

KEY = "import/"
"""Prefix of the idempotency keys of imported samples."""
SAMPLES_AT_ONCE = 512
"""Maximum number of samples in one append."""
MAX_ROW_BYTES = 1 << 26
"""Maximum memory of the samples of one row. Several rows that need more together are appended in parts."""
_BYTES_OF_NULL = 6
"""Size of a missing value in the metadata of an append."""
_NOT_SAMPLES = frozenset({"run_name", "git_commit", "timestamp"})
"""Columns of the metadata file that open-instruct writes beside its shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A row that cannot be imported."""

    file: Path
    row: int | None
    """Counted from 1; None for the whole file, or the rest of it."""
    reason: str

    def __str__(self) -> str:
        return self.reason if self.row is None else f"{self.file}: row {self.row}: {self.reason}"


@dataclass(slots=True, kw_only=True)
class FileImport:
    """Result of the import of one file, or of its dry run."""

    file: Path
    layout: Layout
    num_appended: int = 0
    num_known: int = 0
    """Number of samples that the pool already has, or had before they were removed."""
    num_refused: int = 0
    """Number of refused rows."""
    num_recomputed: int = 0
    """Number of samples whose token ids were made from text."""
    first_round: int | None = None
    last_round: int | None = None
    scores: dict[str, int] = field(default_factory=dict)
    """Score column of the pool -> number of samples with a score."""
    prompt_metadata: set[str] = field(default_factory=set)
    sample_metadata: set[str] = field(default_factory=set)
    examples: list[TokenizedSample] = field(default_factory=list)
    """The first samples, at most 3."""


def import_samples(
    path: Path,
    files: Sequence[Path],
    *,
    tokenizer: Tokenizer,
    tokenizer_name: str,
    vocab_size: int,
    layout: Layout | None = None,
    rewards: Sequence[str] = (),
    of_prompt: Sequence[str] = (),
    is_dry_run: bool = False,
    on_refusal: Callable[[Refusal], None],
    on_progress: Callable[[Path, int], None] = lambda _file, _rows: None,
) -> list[FileImport]:
    """Append the samples of other tools' files to the pool at ``path``, or to a new one there.

    When this returns, they survive a power cut. Rows that cannot be imported are passed to ``on_refusal``.

    Args:
        path: The pool.
        files: Files, or folders whose files are imported in the order of their names.
        tokenizer: The tokenizer of the target model. It encodes texts and decodes token ids.
        tokenizer_name: Stored in the metadata of a new pool.
        vocab_size: Vocabulary size of a new pool. Token ids are below it.
        layout: The layout of all files; None recognizes each file by its columns.
        rewards: Scores whose sum becomes the column ``reward``; empty uses the reward that the tool trained on.
        of_prompt: Further columns that belong to the prompt.
        is_dry_run: Whether to write nothing.
        on_refusal: Called with each row that cannot be imported.
        on_progress: Called from time to time with a file and the number of its rows so far.

    Raises:
        ConfigError: A file fits no layout, an option does not fit, or the pool was made with another tokenizer.
        FileNotFoundError: A file, or the directory for a new pool, does not exist.
        PoolError: An error of the pool.
    """
    found = [
        (file, layout or _layout_of(file, on_refusal if file not in files else None))
        for file in _files(files)
    ]
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent}")
    with closing(_Target(path, tokenizer_name, vocab_size, is_dry_run=is_dry_run)) as target:
        tokens = SampleTokens(tokenizer, target.vocab_size)
        results = []
        for file, its_layout in found:
            if its_layout is None:
                continue
            importing = _Importing(
                FileImport(file=file, layout=its_layout),
                target=target,
                tokens=tokens,
                rewards=rewards,
                on_refusal=on_refusal,
                on_progress=on_progress,
            )
            results.append(importing.run(its_layout, of_prompt))
        return results


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    """All files, and those with a known suffix in folders, without following links."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        inside = sorted(
            file for file in _plain_files(path) if file.suffix.lower() in (*ENDINGS, ".eval")
        )
        if not inside:
            raise ConfigError(f"{path} has no file that ends in {', '.join((*ENDINGS, '.eval'))}")
        yield from inside


def _plain_files(folder: Path) -> Iterator[Path]:
    """The plain files below a folder, however deep it is."""
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)


def layout_of(file: Path) -> Layout | None:
    """The layout of a file, from its name and its first readable row; None if no layout fits.

    Raises:
        FileNotFoundError: The file does not exist.
        ConfigError: Its suffix does not name a format.
        DataError: It cannot be read.
    """
    if file.suffix.lower() == ".eval":
        return Layout.INSPECT
    if file.suffix.lower() == ".json" and file.is_file():
        with file.open("rb") as opened:
            if b'"eval"' in opened.read(4096):
                return Layout.INSPECT
    return recognize(file, first_columns(file))


def _layout_of(file: Path, on_refusal: Callable[[Refusal], None] | None) -> Layout | None:
    """The layout of a file. A file without one is passed to ``on_refusal``, or is an error if that is None."""
    try:
        found = layout_of(file)
        if found is not None:
            return found
        columns = first_columns(file)
        raise ConfigError(
            f"{file} fits no known layout. Its columns are {', '.join(map(repr, columns[:20])) or 'none'}; samples need "
            "at least `prompt` and `completion`"
        )
    except (ConfigError, DataError) as error:
        if on_refusal is None:
            raise
        if isinstance(error, DataError) or not _NOT_SAMPLES.issubset(first_columns(file)):
            on_refusal(Refusal(file=file, row=None, reason=str(error)))
        return None


class _Target:
    """The pool to import into. A new pool is created with its first sample. A dry run creates none."""

    def __init__(
        self, path: Path, tokenizer_name: str, vocab_size: int, *, is_dry_run: bool
    ) -> None:
        self._path = path
        self._tokenizer_name = tokenizer_name
        self._is_dry_run = is_dry_run
        self._pool: NativePool | None = None
        self.known: set[int] = set()
        """Digests of the samples imported so far."""
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            self._pool = NativePool.open(path, writable=not is_dry_run)
            try:
                self._refuse_other_tokenizer(self._pool)
                seeds = self._pool.scan().filter(pl.col("key").str.starts_with(KEY)).select("seed")
                self.known = set(seeds.collect()["seed"].to_list())
            except BaseException:
                self._pool.close()
                raise
        self.vocab_size = vocab_size if self._pool is None else self._pool.settings.vocab_size

    def _refuse_other_tokenizer(self, pool: NativePool) -> None:
        named = pool.settings.metadata.get("tokenizer", pool.settings.metadata.get("model"))
        if named is not None and named != self._tokenizer_name:
            raise ConfigError(
                f"{self._path} was made with the tokenizer of {named!r}, not of {self._tokenizer_name!r}: "
                "pass --tokenizer with that name, or import into another pool"
            )

    def append(
        self, samples: Sequence[TokenizedSample], result: FileImport, round: int, chunk: int
    ) -> int:
        """Commit samples of one step. Returns how many of them the pool has, or had."""
        if self._pool is None and not self._is_dry_run:
            self._pool = NativePool.create(
                self._path,
                vocab_size=self.vocab_size,
                store_text=True,
                metadata={"tokenizer": self._tokenizer_name},
            )
        self.known.update(sample.digest for sample in samples)
        if self._pool is None:
            return 0
        batch = _batch(samples, result, round, chunk, self._pool)
        is_known = self._pool.find(batch.key) is not None
        if not is_known and not self._is_dry_run:
            self._pool.append(batch)
        return len(samples) if is_known else 0

    def close(self) -> None:
        """Close the pool."""
        if self._pool is not None:
            self._pool.close()


class _Importing:
    """The import of one file."""

    def __init__(
        self,
        result: FileImport,
        *,
        target: _Target,
        tokens: SampleTokens,
        rewards: Sequence[str],
        on_refusal: Callable[[Refusal], None],
        on_progress: Callable[[Path, int], None],
    ) -> None:
        self._result = result
        self._target = target
        self._tokens = tokens
        self._rewards = rewards
        self._on_refusal = on_refusal
        self._on_progress = on_progress
        self._counts: Counter[bytes] = Counter()
        self._columns: set[str] = set()
        """Score columns of the file so far."""
        self._waiting: list[TokenizedSample] = []
        self._num_bytes = 0
        self._num_metadata_bytes = 0
        self._metadata_names: set[str] = set()
        self._chunk = 0

    def run(self, layout: Layout, of_prompt: Sequence[str]) -> FileImport:
        """Import all rows of the file."""
        file = self._result.file
        try:
            if layout is Layout.QUARK:
                raise ConfigError(f"{file} is an export of a pool: import it without --tokenizer")
            if layout is Layout.INSPECT:
                for row, sample in samples_of_log(file):
                    if isinstance(sample, str):
                        self._refuse(row, sample)
                    else:
                        self._take_row(row, iter([sample]))
            else:
                self._run_records(layout, of_prompt)
        except DataError as error:  # an error of the whole file; the rows before it are imported
            self._refuse(None, str(error))
        self._flush()
        return self._result

    def _run_records(self, layout: Layout, of_prompt: Sequence[str]) -> None:
        file = self._result.file
        reader = Reader(layout, file, of_prompt=of_prompt)
        for record in records_of(file):
            if record.problem is not None:
                self._refuse(record.row, record.problem)
            else:
                self._take_row(record.row, reader.samples(record.values))
            if record.row % 1000 == 0:
                self._on_progress(file, record.row)

    def _take_row(self, row: int, samples: Iterator[ForeignSample]) -> None:
        """Import the samples of one row, all or none."""
        taken: list[TokenizedSample] = []
        num_bytes = 0
        try:
            for sample in samples:
                taken.append(self._tokenized(sample))
                num_bytes += taken[-1].num_bytes
                if num_bytes > MAX_ROW_BYTES:
                    raise ValueError(
                        f"its samples take more than {MAX_ROW_BYTES:,} bytes of memory, the most that a row may take"
                    )
        except ValueError as error:
            self._refuse(row, str(error))
            return
        for each in taken:
            self._take(each)

    def _tokenized(self, sample: ForeignSample) -> TokenizedSample:
        text = _content(sample)
        content = hashlib.sha256(text).digest()
        self._counts[content] += 1
        count = self._counts[content]
        scores = _score_columns(sample, self._rewards)
        if len(self._columns | scores.keys()) > MAX_SCORE_COLUMNS + 1:
            raise ValueError(
                f"a file has at most {MAX_SCORE_COLUMNS} scores, and it has further ones"
            )
        self._columns |= scores.keys()
        digest = hashlib.sha256(content + count.to_bytes(8, "little")).digest()
        return self._tokens.of(
            sample, scores, int.from_bytes(digest[:8], "little"), num_bytes=len(text)
        )

    def _refuse(self, row: int | None, reason: str) -> None:
        self._result.num_refused += 1
        self._on_refusal(Refusal(file=self._result.file, row=row, reason=reason))

    def _take(self, sample: TokenizedSample) -> None:
        if sample.digest in self._target.known:
            self._result.num_known += 1
            return
        step = sample.source.step
        if self._waiting and (
            step != self._waiting[0].source.step
            or sample.has_own_tokens != self._waiting[0].has_own_tokens
            or len(self._waiting) >= SAMPLES_AT_ONCE
            or self._num_bytes + sample.num_bytes > MAX_ROW_BYTES
            or self._metadata_with(sample) > MAX_SAMPLE_METADATA
        ):
            self._flush()
        self._num_metadata_bytes += _metadata_size(sample)
        self._metadata_names |= sample.source.of_sample.keys()
        self._num_bytes += sample.num_bytes
        self._waiting.append(sample)

    def _metadata_with(self, sample: TokenizedSample) -> int:
        """Size of the metadata of the waiting samples and this one. Each has a value in every column."""
        num_names = len(self._metadata_names | sample.source.of_sample.keys())
        nulls = num_names * (len(self._waiting) + 1) * _BYTES_OF_NULL
        return self._num_metadata_bytes + _metadata_size(sample) + nulls

    def _flush(self) -> None:
        if not self._waiting:
            return
        samples, self._waiting = self._waiting, []
        self._num_bytes = self._num_metadata_bytes = 0
        self._metadata_names.clear()
        round = samples[0].source.step
        self._chunk = self._chunk + 1 if self._result.last_round == round else 0
        num_known = self._target.append(samples, self._result, round, self._chunk)
        self._count(samples, num_known, round)

    def _count(self, samples: Sequence[TokenizedSample], num_known: int, round: int) -> None:
        result = self._result
        result.num_known += num_known
        result.num_appended += len(samples) - num_known
        result.num_recomputed += sum(not sample.has_own_tokens for sample in samples)
        rounds = [r for r in (result.first_round, result.last_round, round) if r is not None]
        result.first_round, result.last_round = min(rounds), max(rounds)
        for sample in samples:
            for name, score in sample.scores.items():
                result.scores[name] = result.scores.get(name, 0) + (not math.isnan(score))
            result.prompt_metadata.update(sample.source.of_prompt)
            result.sample_metadata.update(sample.source.of_sample)
        result.examples += samples[: 3 - len(result.examples)]


def _score_columns(sample: ForeignSample, rewards: Sequence[str]) -> dict[str, float]:
    """Scores under valid column names, and the reward. Raises ValueError if that is impossible."""
    reward = sample.reward
    if rewards:
        missing = [name for name in rewards if name not in sample.scores]
        if missing and not (missing == [REWARD_COLUMN] and not math.isnan(reward)):
            raise ValueError(
                f"it has no score {', '.join(missing)} (it has: {', '.join(sample.scores)})"
            )
        own = {**sample.scores, REWARD_COLUMN: sample.scores.get(REWARD_COLUMN, reward)}
        reward = added([own[name] for name in rewards], "--reward")
    columns: dict[str, float] = {}
    for name, score in sample.scores.items():
        column = column_name(name) or "_"
        if column == REWARD_COLUMN:
            column = "reward_of_file"
        if column in columns:
            raise ValueError(f"column {name}: another score has the name {column!r} in a pool, too")
        columns[column] = score
    columns[REWARD_COLUMN] = reward
    for column, number in (*columns.items(), ("logprobs", sample.logprob_sampled)):
        try:
            struct.pack("<f", number)
        except OverflowError:
            raise ValueError(f"column {column}: {number!r} does not fit into 32 bits") from None
    return columns


def _metadata_size(sample: TokenizedSample) -> int:
    return len(json.dumps(sample.source.of_sample)) if sample.source.of_sample else 0


def _content(sample: ForeignSample) -> bytes:
    """The row's content as bytes, independent of its file and format."""
    parts = [
        sample.prompt,
        sample.completion,
        sample.prompt_tokens,
        sample.completion_tokens,
        {name: repr(score) for name, score in sample.scores.items()},
        repr(sample.reward),
        sample.step,
        sample.of_prompt,
        sample.of_sample,
    ]
    return json.dumps(parts, sort_keys=True, default=str).encode()


def _batch(
    samples: Sequence[TokenizedSample],
    result: FileImport,
    round: int,
    chunk: int,
    pool: NativePool,
) -> SampleBatch:
    """The samples of one step as an append."""
    digest = hashlib.sha256(b"".join(s.digest.to_bytes(8, "little") for s in samples))
    prompts: dict[tuple[tuple[int, ...], str, str], int] = {}
    prompt_index = [
        prompts.setdefault((s.prompt_tokens, s.prompt_text, s.prompt_metadata), len(prompts))
        for s in samples
    ]
    tokens, texts, metadata = zip(*prompts, strict=True)
    names = sorted({name for sample in samples for name in sample.source.of_sample})
    columns: dict[str, Json] = {
        name: [sample.source.of_sample.get(name) for sample in samples] for name in names
    }
    settings = {
        "imported": {
            "layout": str(result.layout),
            "file": plain_json(result.file.name),  # a name need not be UTF-8
            "tokens": "given" if samples[0].has_own_tokens else "recomputed",
        },
        **({"columns": columns} if columns else {}),
    }
    scores = dict.fromkeys(name for sample in samples for name in sample.scores)
    return SampleBatch(
        key=f"{KEY}{digest.hexdigest()[:32]}",
        prompts=PromptColumns(
            token_ids=np.fromiter(chain.from_iterable(tokens), np.uint32),
            offsets=np.cumsum([0, *map(len, tokens)]),
            texts=texts,
            metadata=metadata,
        ),
        prompt_index=np.array(prompt_index, np.uint32),
        completion_tokens=np.fromiter(
            chain.from_iterable(s.completion_tokens for s in samples), np.uint32
        ),
        completion_offsets=np.cumsum([0, *(len(s.completion_tokens) for s in samples)]),
        completion_texts=(
            [s.completion_text for s in samples] if pool.settings.store_text else None
        ),
        finish_reasons=np.array([int(s.source.finish_reason) for s in samples], np.uint8),
        round=round,
        chunk=chunk,
        policy_step=round,
        reward_tokens=np.full(len(samples), -1, np.int16),
        settings=json.dumps(settings, sort_keys=True),
        seeds=np.array([s.digest for s in samples], np.uint64),
        logprob_sampled=(
            np.array([s.source.logprob_sampled for s in samples], np.float32)
            if pool.has_sampled_logprobs
            else None
        ),
        scores={
            name: np.array([s.scores.get(name, np.nan) for s in samples], np.float32)
            for name in scores
        },
    )
