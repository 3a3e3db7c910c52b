"""A file of a data set on the Hub, downloaded once into the Hub's cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from quark.errors import DataError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"
_SOURCE = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>[^@]+))?"
)
_ENDINGS = (".parquet", ".jsonl", ".ndjson", ".csv")


def is_on_hub(source: str) -> bool:
    """Whether a source of prompts is a data set on the Hub."""
    return source.startswith(SCHEME)


def hub_file(source: str, *, is_offline: bool = False) -> Path:
    """The file that ``hf://datasets/OWNER/NAME[@REVISION]/FILE`` names, downloaded where it is not in the cache.

    Args:
        source: As above. Without FILE, the error lists the data files that there are.
        is_offline: Whether only the cache may be used.

    Raises:
        DataError: The source is not written like this, there is no such file, or the Hub cannot be reached.
    """
    match = _SOURCE.fullmatch(source)
    parts = [] if match is None or match["file"] is None else match["file"].split("/")
    if match is None or not {"", ".", ".."}.isdisjoint(parts):
        raise DataError(
            f"{source}: write a file of a data set on the Hub as hf://datasets/OWNER/NAME[@REVISION]/FILE"
        )
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, file, revision = match["repo"], match["file"], match["revision"]
    try:
        if file is None:
            raise DataError(
                f"{source}: name a file of it" + _files(HfApi(), repo, revision, is_offline)
            )
        return Path(
            hf_hub_download(
                repo, file, revision=revision, repo_type="dataset", local_files_only=is_offline
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{source} cannot be read from the Hub: {reason}") from error


def _files(api: HfApi, repo: str, revision: str | None, is_offline: bool) -> str:
    if is_offline:
        return ""
    files = api.list_repo_files(repo, revision=revision, repo_type="dataset")
    found = [file for file in files if file.endswith(_ENDINGS)]
    return f". It has {', '.join(found[:20]) or 'no data file that quark reads'}"
