"""Rows of numbers per sample in files that can be thrown away: whole, undamaged and of the same origin, or not there.

    reference_cache/000000000128-64.safetensors     rows of samples 128 .. 191, one after another

A file carries the SHA-256 of its rows and a digest of what they were computed from. It is written under
another name and renamed; nothing is synced, since what a power cut takes is computed again.
"""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_KEY = "origin and sha256"
"""The one entry of a file's metadata: the library writes several in any order, and files are to be equal."""


class RowFiles:
    """The files of one run.

    Args:
        folder: made where missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, ids: range, *, origin: str) -> Tensor | None:
        """The rows [M, D] of samples ``ids``, mapped from disk; None where they are not there.

        Args:
            ids: as they were saved.
            origin: hex digest of what the rows shall be computed from. Rows of another origin and
                damaged ones are not there.
        """
        try:
            with safe_open(self._path(ids), framework="pt") as file:
                rows: Tensor = file.get_tensor("rows")
                made = (file.metadata() or {}).get(_KEY)
        except (OSError, SafetensorError):
            return None
        return rows if made == f"{origin} {_sha256(rows)}" else None

    def save(self, ids: range, rows: Tensor, *, origin: str) -> None:
        """Publish the rows [M, D] of samples ``ids``.

        Raises:
            OSError: the disk refused.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self._path(ids)
        staged = final.with_name(f"{final.name}.partial-{uuid.uuid4().hex[:8]}")
        rows = rows.cpu().contiguous()
        try:
            save_file({"rows": rows}, staged, metadata={_KEY: f"{origin} {_sha256(rows)}"})
            staged.replace(final)
        except SafetensorError as err:
            raise OSError(f"{final}: {err}") from err
        finally:
            staged.unlink(missing_ok=True)

    def _path(self, ids: range) -> Path:
        return self._folder / f"{ids.start:012d}-{len(ids)}.safetensors"


def _sha256(rows: Tensor) -> str:
    return hashlib.sha256(rows.view(-1).view(torch.uint8).numpy().data).hexdigest()
