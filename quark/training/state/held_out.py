"""The held-out prompts of a run, stored in its directory. `quark evaluate` measures the run on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quark import safe_files
from quark.config.schema import RunConfig
from quark.data.prompt_rows import source_file
from quark.errors import DataError, PoolError, RunDirectoryError
from quark.formats import VERSION_KEY, check_version
from quark.pool.native import NativePool
from quark.publication import publish_file
from quark.run_directory import RunDirectory
from quark.types import Prompt

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The recorded held-out prompts."""

    prompts: tuple[Prompt, ...]
    source: str
    """``prompts.evaluation_source``, or else ``prompts.source``."""
    source_sha256: str
    """SHA-256 of that file when the run began."""

    def source_has_changed(self) -> bool:
        """Whether the file has changed or was removed since."""
        try:
            file = source_file(self.source, is_offline=True)
            # The run may come from a stranger. Opening a named pipe or a device could block or never end.
            return not file.is_file() or _sha256(file) != self.source_sha256
        except (OSError, ValueError, DataError):
            return True


def write_held_out(run: RunDirectory, config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Record the held-out prompts, one JSON object per line, atomically. The file is also a valid prompt file.

    Raises:
        OSError: a disk operation failed.
    """
    source = config.prompts.evaluation_source or config.prompts.source
    digest = _sha256(source_file(source))
    rows = [
        {
            "prompt": prompt.text,
            "token_ids": prompt.token_ids,
            "metadata": dict(prompt.metadata),
            "source": source,
            "source_sha256": digest,
            VERSION_KEY: FORMAT_VERSION,
        }
        for prompt in prompts
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    publish_file(run.held_out, text)


def read_held_out(run: RunDirectory, *, vocab_size: int | None = None) -> HeldOut | None:
    """The recorded prompts; None for a run from before they were recorded.

    Args:
        run: the run directory.
        vocab_size: vocabulary of the model that gets the tokens; None checks no bound.

    Raises:
        RunDirectoryError: the file is damaged or has a token outside the vocabulary (names the line), or a newer quark
            wrote it.
        UnsafeFileError: it is a link out of the run, or not a plain file.
    """
    try:
        lines = safe_files.read_bytes(run.held_out, run.path).splitlines()
    except FileNotFoundError:
        return None
    except OSError as err:
        raise RunDirectoryError(f"cannot read {run.held_out}: {err}") from err
    prompts, source, digest = [], "", ""
    for index, line in enumerate(lines):
        try:
            row = json.loads(line)
            check_version(row, run.held_out, newest=FORMAT_VERSION, error=RunDirectoryError)
            text, source, digest = row["prompt"], row["source"], row["source_sha256"]
            ids, metadata = row["token_ids"], row["metadata"]
            is_sound = all(isinstance(value, str) for value in (text, source, digest))
            is_sound &= isinstance(metadata, dict) and isinstance(ids, list) and bool(ids)
            is_sound = is_sound and all(type(i) is int and i >= 0 for i in ids)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            is_sound = False
        if not is_sound:
            raise RunDirectoryError(
                f"{run.held_out}:{index + 1} is damaged: give the prompts to evaluate on by --prompts"
            )
        if vocab_size is not None and max(ids) >= vocab_size:
            raise RunDirectoryError(
                f"{run.held_out}:{index + 1} is damaged or belongs to another model: it has the token "
                f"{str(max(ids))[:20]}, and the model has {vocab_size:,} tokens. Give the prompts to evaluate on by "
                "--prompts"
            )
        prompts.append(
            Prompt(
                index=index,
                text=text,
                token_ids=tuple(ids),
                metadata=metadata,
                place=f"{run.held_out}:{index + 1}",
            )
        )
    if not prompts:
        raise RunDirectoryError(
            f"{run.held_out} is empty: give the prompts to evaluate on by --prompts"
        )
    return HeldOut(prompts=tuple(prompts), source=source, source_sha256=digest)


def are_those_of(run: RunDirectory, prompts: Sequence[Prompt]) -> bool:
    """Whether ``prompts`` are the held-out prompts of the run, according to its pool."""
    try:
        with NativePool.open(run.pool) as pool:
            return pool.info().metadata.get("held_out_prompts") in (None, prompts_digest(prompts))
    except (PoolError, OSError):
        return True


def fields_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the other fields of the prompts' rows, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(dict(prompt.metadata), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts' tokens, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt.token_ids).encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
