"""Results of checks, kept by the hash of what decides them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quark.errors import ModelError
from quark.formats import VERSION_KEY, check_version, object_in
from quark.models.check.results import ModelCheck
from quark.models.check.trials import LARGEST_SAVED_BYTES, check_policy
from quark.models.config import ModelConfig
from quark.models.loading import model_folder
from quark.models.policy import Policy
from quark.publication import publishing

FORMAT_VERSION = 1
_CHECKS_VERSION = 2
"""Counts changes of the checks: older results are not used."""
_PACKAGES = ("torch", "transformers", "tokenizers", "peft")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def checked(config: ModelConfig, policy: Policy) -> ModelCheck:
    """The result of checking ``policy``, from an earlier time if nothing that decides it has changed.

    Args:
        config: of the policy's model.
        policy: as it was loaded.
    """
    path = _path(config, policy)
    if path is None:
        return check_policy(policy)
    kept = _read(path)
    if kept is not None:
        return kept
    result = check_policy(policy)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({VERSION_KEY: FORMAT_VERSION, **result.to_json()}, indent=2) + "\n"
        with publishing(path, is_durable=False) as file:
            file.write_all(text.encode())
    except OSError:
        pass  # a cache that cannot be written is filled another time
    return result


def _read(path: Path) -> ModelCheck | None:
    """A kept result; None if there is none that can be read."""
    try:
        said = object_in(json.loads(path.read_text(encoding="utf-8")))
        check_version(said, path, newest=FORMAT_VERSION, error=ModelError)
        return ModelCheck.of_json(said)
    except (OSError, ValueError, KeyError, RecursionError, ModelError):
        return None


def _path(config: ModelConfig, policy: Policy) -> Path | None:
    """Where the result belongs; None for a model whose files are not known exactly, or are too many to hash."""
    folder = model_folder(config)
    if folder is not None:
        files = _files(folder)
    elif _COMMIT.fullmatch(config.revision or ""):
        files = [config.name, config.revision or ""]
    else:
        files = None
    if files is None:
        return None
    decides = {
        "checks": _CHECKS_VERSION,
        "packages": [_version(name) for name in _PACKAGES],
        "files": files,
        "device": policy.device.type,
        "dtype": str(policy.model.dtype),
        "num_quantiles": policy.reward_tokens.num_quantiles,
        "settings": config.model_dump(mode="json", exclude={"name", "revision", "cache_dir"}),
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    return _state_folder() / f"{digest.hexdigest()}.json"


def _files(folder: Path) -> list[str] | None:
    """Name and hash of every file of a model, weights included; None if they have more than ``LARGEST_SAVED_BYTES``.

    A part of the content would not do: whoever made a model that passes could send another one that looks alike. The
    checks of a larger model try little and take less time than to read it.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if sum(path.stat().st_size for path in paths) > LARGEST_SAVED_BYTES:
        return None
    found = []
    for path in paths:
        with path.open("rb") as file:
            found += [
                str(path.relative_to(folder)),
                hashlib.file_digest(file, "sha256").hexdigest(),
            ]
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "quark" / "checks"
