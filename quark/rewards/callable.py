"""A reward that is a function of the user's own code: ``module:function`` or ``path/to/file.py:function``.

A module is imported as Python would anywhere else, from what is installed or on ``PYTHONPATH``; the
current folder is never searched implicitly. A file is named by its path, and exactly that file is
run.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from quark.errors import RewardError
from quark.rewards.fields import FieldsAsked, fields_of_function
from quark.rewards.raised_at import raised_at
from quark.rewards.source_files import hashes, source_files
from quark.types import Json


class CallableReward:
    """Calls ``function(prompts=..., completions=...)`` and returns the result unchecked.

    Further parameters are fields of the prompts' rows (``quark.rewards.fields``). ``function`` may also be an object
    whose ``__call__`` takes these, or a class without required arguments, of which one such object is made. An ``async`` function runs in an event loop of its own.
    """

    def __init__(self, reference: str) -> None:
        """Resolve ``reference``.

        Raises:
            RewardError: The module or file cannot be loaded, has no such function, or the function
                cannot be called with ``prompts`` and ``completions``.
        """
        module_name, separator, attribute = reference.rpartition(":")
        if not separator or not module_name or not attribute:
            raise RewardError(f"{reference!r} is not module:function or path/to/file.py:function")
        module = (
            _load_file(Path(module_name))
            if module_name.endswith(".py")
            else _load_module(module_name)
        )
        target: object = module
        for part in attribute.split("."):
            if not hasattr(target, part):
                names = ", ".join(sorted(n for n, v in vars(module).items() if _is_offered(n, v)))
                raise RewardError(
                    f"{module_name} has no {attribute!r}; it offers: {names or 'nothing'}"
                )
            target = getattr(target, part)
        if isinstance(target, type):
            try:
                target = target()
            except Exception as err:
                raise RewardError(
                    f"{reference}() failed: {type(err).__name__}: {err}"
                    f"{raised_at(err, getattr(module, '__file__', None))}"
                ) from err
        self._function = checked(target, reference)
        self.fields_asked: FieldsAsked = fields_of_function(target)
        """Fields of the prompts' rows that the function asks for."""
        self._reference = reference
        file = getattr(module, "__file__", None)
        self.path: Path | None = Path(file).resolve() if file else None
        """The file that holds the code; None for a module without one."""
        self.sha256: str | None = (
            hashlib.sha256(self.path.read_bytes()).hexdigest() if self.path else None
        )
        """SHA-256 of that file when it was loaded."""
        self.files: Mapping[str, str] = (
            hashes(source_files(self.path)[1:], self.path.parent) if self.path else {}
        )
        """SHA-256 of the modules of yours that it imports from its folder, by name."""

    @property
    def name(self) -> str:
        """The function's ``name`` attribute if that is a string, else the reference's part after the colon."""
        name = getattr(self._function, "name", None)
        return name if isinstance(name, str) else self._reference.rpartition(":")[2]

    @property
    def provenance(self) -> Mapping[str, Json]:
        """The identity of the code."""
        return {
            "reference": self._reference,
            "path": str(self.path) if self.path else None,
            "sha256": self.sha256,
            **({"files": dict(self.files)} if self.files else {}),
        }

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **fields: Sequence[Json]
    ) -> Sequence[float | None]:
        """Call the function once with the whole batch; if it is asynchronous, run it to its end."""
        scores = self._function(prompts=prompts, completions=completions, **fields)
        return awaited(scores) if inspect.iscoroutine(scores) else scores


def awaited(scores: Coroutine[None, None, Sequence[float | None]]) -> Sequence[float | None]:
    """The scores of an ``async`` function, in an event loop of their own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(scores)
    with ThreadPoolExecutor(
        max_workers=1
    ) as thread:  # a thread that runs a loop cannot start another
        return thread.submit(asyncio.run, scores).result()


def _is_offered(name: str, value: object) -> bool:
    return callable(value) and not name.startswith("_")


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as err:
        file = Path(f"{name.replace('.', '/')}.py")
        hint = f"; for the file in this folder write ./{file}:function" if file.is_file() else ""
        raise RewardError(f"cannot import {name!r}: {type(err).__name__}: {err}{hint}") from err


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"{path} is not a file")
    resolved = path.resolve()
    # Named after its path, so that two files of one name do not replace each other.
    name = f"_quark_reward_{hashlib.sha256(str(resolved).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as err:
        del sys.modules[name]
        raise RewardError(
            f"cannot run {path}: {type(err).__name__}: {err}{raised_at(err, resolved)}"
        ) from err
    return module


def checked(target: object, reference: str) -> Callable[..., Sequence[float | None]]:
    """``target``, if it can be called with ``prompts``, ``completions`` and the fields that it asks for.

    ``reference`` names it in the error.

    Raises:
        RewardError: It cannot.
    """
    if not callable(target):
        raise RewardError(f"{reference} is {type(target).__name__}, not a function")
    try:
        fields = dict.fromkeys(fields_of_function(target).required)
        inspect.signature(target).bind(prompts=[], completions=[], **fields)
    except TypeError as err:
        raise RewardError(
            f"{reference} cannot be called as function(prompts=..., completions=...): {err}"
        ) from err
    except ValueError:  # a built-in without a signature: the call will tell
        pass
    return target
