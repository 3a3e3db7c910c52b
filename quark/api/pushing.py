"""Publishes a run's model on the Hub: what `quark push` and `Run.push` share. Nothing is sent before ``confirm`` agrees."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from quark.api.cards import license_for
from quark.api.exporting import export_model
from quark.api.trained_model import open_model
from quark.errors import ConfigError, ModelError, RunDirectoryError
from quark.run_directory import RunDirectory

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_KINDS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md")
"""Files of a model folder that are published; there are no others in one that quark wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What is about to be published."""

    repo: str
    is_private: bool
    endpoint: str
    files: tuple[tuple[str, int], ...]
    """Name and bytes."""
    license: str | None

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files)


def push(
    run: RunDirectory,
    repo: str,
    *,
    confirm: Callable[[Upload], bool],
    is_private: bool = True,
    license: str | None = None,
    checkpoint: str | None = None,
    allow: Collection[str] = (),
) -> str | None:
    """Upload a run's model with its card to a model repository of the Hub; it is made where missing.

    Args:
        run: whose model it is.
        repo: ``owner/name``.
        confirm: is asked once all is ready, and shown what would be sent.
        is_private: of a repository that is made.
        license: identifier on the Hub; None takes that of the original model's card, if it lies on this machine.
        checkpoint: ``best``, ``last`` or a step; None is the finished model.
        allow: what the run's configuration may reach, where a checkpoint needs the original model.

    Returns:
        The address of the commit; None where ``confirm`` said no.

    Raises:
        ConfigError: ``repo`` or ``license`` is not possible.
        RunDirectoryError: there is no run.
        ModelError: the Hub refused; says why.
    """
    if not _REPO.fullmatch(repo):
        raise ConfigError(f"{repo} is not a repository: write OWNER/NAME")
    if not run.is_run():
        raise RunDirectoryError(f"{run.path} is not a run directory")
    from huggingface_hub import HfApi

    api = HfApi()
    with TemporaryDirectory() as place:
        source = open_model(str(run.path), checkpoint=checkpoint, allow=allow)
        folder = export_model(source, Path(place) / "model", license=license)
        names = sorted(path for kind in _KINDS for path in folder.glob(kind))
        upload = Upload(
            repo=repo,
            is_private=is_private,
            endpoint=api.endpoint,
            files=tuple((path.name, path.stat().st_size) for path in names),
            license=license or license_for(run),
        )
        if not confirm(upload):
            return None
        try:
            api.create_repo(repo, private=is_private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=list(_KINDS),
                commit_message="Upload a model trained with quark",
            )
        except Exception as err:
            raise ModelError(f"the Hub refused {repo}: {_reason(err)}") from err
    return str(commit.commit_url)


def _reason(err: Exception) -> str:
    status = getattr(getattr(err, "response", None), "status_code", None)
    if status == 401:
        return "you are not logged in. Log in with `hf auth login`"
    if status == 403:
        return "your token may not write there"
    first = str(err).strip().splitlines()
    return first[0] if first else type(err).__name__
