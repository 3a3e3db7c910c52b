"""Where the data files are that the project does not carry."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_CHECKOUT = Path(__file__).resolve().parent.parent


def shared_data(name: str) -> Path:
    """The file of that name in ``$QUARK_DATA`` or in ``shared/data`` in or beside the checkout; skips without it."""
    named = os.environ.get("QUARK_DATA")
    folders = [
        *([Path(named)] if named else []),
        _CHECKOUT / "shared" / "data",
        _CHECKOUT.parent / "shared" / "data",
    ]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is not in $QUARK_DATA or in a shared/data folder")
