"""Rows of numbers in disposable files: a row is whole, undamaged and of the right origin, or missing.

    reference_cache/5e/5e0c…9d.safetensors     the rows that follow from what has this digest

A file is named after a digest of what its rows were computed from, and carries their SHA-256. It is written
under another name and renamed; nothing is synced, since what a power cut takes is computed again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from quark.publication import publish_file


class RowFiles:
    """The files of one run.

    Args:
        folder: created if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, origin: str) -> Tensor | None:
        """The rows [M, D] that follow from ``origin``, mapped from disk; None if they are missing.

        Args:
            origin: hex digest of what they are computed from.
        """
        try:
            with safe_open(self._path(origin), framework="pt") as file:
                rows: Tensor = file.get_tensor("rows")
                digest = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            return None
        return rows if digest == _sha256(rows, origin) else None

    def save(self, origin: str, rows: Tensor) -> None:
        """Publish the rows [M, D] that follow from ``origin``.

        Raises:
            OSError: the disk refused.
        """
        final = self._path(origin)
        final.parent.mkdir(parents=True, exist_ok=True)
        rows = rows.cpu().contiguous()
        content = save({"rows": rows}, metadata={"sha256": _sha256(rows, origin)})
        publish_file(final, content, is_durable=False)

    def _path(self, origin: str) -> Path:
        return self._folder / origin[:2] / f"{origin}.safetensors"


def _sha256(rows: Tensor, origin: str) -> str:
    """Of the rows, and of their origin: a file under another's name is not taken for it."""
    digest = hashlib.sha256(origin.encode())
    digest.update(rows.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
