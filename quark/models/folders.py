"""Refuses unsafe model files before transformers reads them: a model's files are data.

transformers does more with the files of a model than read numbers. A configuration can name
attention code on the Hub, an adapter names a base model that is fetched, and a link leads to any
file. None of this is the user's word, so a model that needs it is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from quark.errors import ModelError
from quark.safe_files import check_tree

_ADAPTER_FILE = "adapter_config.json"
_CODE_SETTINGS = frozenset(
    {
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
        "_experts_implementation",
    }
)
"""Settings of a model's configuration whose value may be a kernel on the Hub, written with a slash."""


def check_folder(folder: Path) -> None:
    """Refuse a model folder that leads elsewhere.

    Raises:
        UnsafeFileError: a link leads out of the folder, or something in it is neither a file nor a folder.
        ModelError: it holds an adapter, whose base model is another folder or on the Hub.
    """
    check_tree(folder, folder)
    if (folder / _ADAPTER_FILE).is_file():
        raise _adapter(str(folder))


@cache
def commit_of(name: str, revision: str | None) -> str:
    """The commit that a revision of a Hub repository means; offline, the one in the cache.

    It is asked for once in a process. What is checked, the tokenizer, the policy and the reference are then of one
    commit, even if the branch moves meanwhile.

    Args:
        name: of the repository.
        revision: a branch, a tag or a commit; None is ``main``.

    Raises:
        OSError: it has none, or no configuration.
    """
    from transformers.utils.hub import cached_file

    path = cached_file(name, "config.json", revision=revision or "main")
    return Path(str(path)).parent.name  # the cache keeps a commit in a folder of its name


def check_repository(location: str, *, revision: str) -> None:
    """Refuse a Hub repository that is an adapter: it would have its base model fetched.

    Raises:
        ModelError: it is one.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(location, revision=revision) is not None:
        raise _adapter(location)


def check_configuration(location: str, *, revision: str | None, is_local: bool) -> None:
    """Refuse a model whose configuration asks for code from the Hub.

    Args:
        location: a folder, or a name on the Hub.
        revision: on the Hub.
        is_local: whether it is a folder.

    Raises:
        ModelError: it names such code.
        OSError, ValueError: the configuration cannot be read.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(
        location, revision=revision or "main", local_files_only=is_local
    )
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:
        key, value = pending.pop()
        if isinstance(value, Mapping):
            # Such a setting can have one value for each part of the model.
            is_setting = key in _CODE_SETTINGS
            pending += [(key if is_setting else name, item) for name, item in value.items()]
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
        elif key in _CODE_SETTINGS and isinstance(value, str) and "/" in value:
            raise ModelError(
                f"{location}: its configuration sets {key} to {value!r}, code on the Hub, which quark does not run. "
                "Remove the setting from its config.json"
            )


@contextmanager
def offline() -> Iterator[None]:
    """Within: the Hub's client sends nothing. A local folder does not need it."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _adapter(name: str) -> ModelError:
    return ModelError(
        f"{name} holds an adapter ({_ADAPTER_FILE}), whose base model is somewhere else. Merge the two with peft "
        "(merge_and_unload, save_pretrained) and give that folder"
    )
