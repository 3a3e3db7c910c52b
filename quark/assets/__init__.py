"""Files that ship inside the wheel: the embedded model, rewards and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

AssetKind = Literal["models", "rewards", "prompts"]

_FOLDER = Path(__file__).parent
_SUFFIX = {"models": "", "rewards": "", "prompts": ".jsonl"}


def asset_path(kind: AssetKind, name: str) -> Path:
    """The folder of an embedded model or reward, or the file of embedded prompts.

    >>> asset_path("prompts", "reviews").name
    'reviews.jsonl'

    Raises:
        FileNotFoundError: There is no such asset; the message names those there are.
    """
    names = asset_names(kind)
    if name not in names:
        raise FileNotFoundError(
            f"no embedded {kind.removesuffix('s')} named {name!r}; there is: {', '.join(names)}"
        )
    return _FOLDER / kind / f"{name}{_SUFFIX[kind]}"


def asset_names(kind: AssetKind) -> list[str]:
    """The names of what ships of a kind, sorted."""
    suffix = _SUFFIX[kind]
    return sorted(
        path.name.removesuffix(suffix)
        for path in (_FOLDER / kind).iterdir()
        if path.name.endswith(suffix) and not path.name.startswith(("_", "."))
    )
