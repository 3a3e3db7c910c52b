"""Where in a user's own code an exception came from."""

from __future__ import annotations

import traceback
from pathlib import Path


def raised_at(error: BaseException, file: Path | str | None) -> str:
    """`` (FILE:LINE)`` of the innermost frame of ``error`` in ``file``; nothing where it has none there."""
    if file is None:
        return ""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == Path(file).resolve()
    ]
    return f" ({file}:{lines[-1]})" if lines else ""
