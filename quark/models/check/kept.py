"""Results of checks, kept by the hash of what decides them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quark.errors import ModelError
from quark.formats import VERSION_KEY, check_version, object_in
from quark.models.check.results import ModelCheck
from quark.models.check.trials import check_policy
from quark.models.config import ModelConfig
from quark.models.loading import model_folder
from quark.models.policy import Policy
from quark.publication import publishing

FORMAT_VERSION = 1
_CHECKS_VERSION = 1
"""Counts changes of the checks: older results are not used."""
_PACKAGES = ("torch", "transformers", "tokenizers", "peft")
_READ_WHOLE = frozenset({".json", ".jinja", ".txt", ".model"})


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
    """Where the result belongs; None for a model on the Hub whose commit is not known."""
    folder = model_folder(config)
    commit = getattr(policy.model.config, "_commit_hash", None)
    if folder is None and commit is None:
        return None
    digest = hashlib.sha256()
    decides = {
        "checks": _CHECKS_VERSION,
        "packages": [_version(name) for name in _PACKAGES],
        "commit": None if folder is not None else [config.name, commit],
        "device": policy.device.type,
        "dtype": str(policy.model.dtype),
        "num_quantiles": policy.reward_tokens.num_quantiles,
        "settings": config.model_dump(mode="json", exclude={"name", "revision", "cache_dir"}),
    }
    digest.update(json.dumps(decides, sort_keys=True).encode())
    for path in sorted(folder.iterdir()) if folder is not None else ():
        if path.suffix in _READ_WHOLE and path.is_file():
            content = path.read_bytes()
        elif path.suffix == ".safetensors":
            content = _header(path)
        else:
            continue
        digest.update(f"\n{path.name} {path.stat().st_size} {len(content)}\n".encode() + content)
    return _state_folder() / f"{digest.hexdigest()[:32]}.json"


def _header(path: Path) -> bytes:
    """Names, types and shapes of a file's tensors. Their values decide no check."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(min(length, 1 << 26))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "quark" / "checks"
