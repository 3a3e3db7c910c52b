"""Finds the line of the user's code that raised an exception."""

from __future__ import annotations

import traceback
from pathlib import Path


def raised_at(error: BaseException, file: Path | str | None) -> str:
    """`` (FILE:LINE)`` of the innermost frame of ``error`` in ``file``; empty if it has none there."""
    if file is None:
        return ""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == Path(file).resolve()
    ]
    return f" ({file}:{lines[-1]})" if lines else ""
