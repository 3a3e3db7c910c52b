"""Where `quark reward train` writes: nothing is replaced without the user's consent."""

from __future__ import annotations

from pathlib import Path

from quark.errors import ConfigError


def check_output(folder: Path, marker: str, what: str, *, force: bool) -> None:
    """Check that a folder can be written.

    Args:
        folder: may be missing or empty.
        marker: name of a file that only such folders have.
        what: they hold, with its article.
        force: whether the user agreed to replace it.

    Raises:
        ConfigError: it is a file, holds something else, or would be replaced without consent.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file: --output takes a folder")
    if not any(folder.iterdir()):
        return
    if not (folder / marker).is_file():
        raise ConfigError(f"{folder} holds files that are not {what}: choose another folder")
    if not force:
        raise ConfigError(
            f"{folder} holds {what}: choose another folder, or add --force to replace it"
        )
