"""Every error that quark raises on purpose.

A caller's mistake or the world's ends in one of these (or in a built-in exception where Python has the
right one: ``FileNotFoundError``, ``ValueError``, ``IndexError``); our own mistakes are assertions. The
Rust extension raises the ``PoolError`` family from here, so there is one tree.
"""

from __future__ import annotations


class QuarkError(Exception):
    """Base of all errors that quark raises on purpose."""


class ConfigError(QuarkError):
    """A configuration key or value is wrong; names the key, the value and the nearest valid key."""


class DataError(QuarkError):
    """A prompt or training file cannot be used; names the file and the row."""


class ModelError(QuarkError):
    """A model or tokenizer cannot be loaded, saved or used; names it and what to do."""


class RewardError(QuarkError):
    """A reward function failed or returned something unusable; names it, the position and the value."""


class CheckpointError(QuarkError):
    """No usable checkpoint, or a checkpoint that does not fit the run."""


class RunDirectoryError(QuarkError):
    """A run directory is in the way, missing, or not one of ours."""


class UnsafeFileError(QuarkError):
    """A file of a run or model folder is a link out of it, not a plain file, or far too large; names it."""


class TrainingError(QuarkError):
    """Training cannot go on (non-finite weights, too many skipped steps)."""


class PoolError(QuarkError):
    """Base of the sample pool's errors."""


class PoolCorruptedError(PoolError):
    """Bytes on disk are not what was committed; names the file, the offset and what was expected."""


class PoolVersionError(PoolError):
    """The pool's format version is not supported; names the found and the supported versions."""


class PoolLockedError(PoolError):
    """Another process holds the writer's lock; names it."""


class PoolSnapshotError(PoolError):
    """A collection has given up the snapshot that is read; names it, and the oldest that is left."""


class PoolPoisonedError(PoolError):
    """A sync failed, so the writer's state is unknown: reopen the pool to continue."""
