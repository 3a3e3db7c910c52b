"""A reward that is an object in the process that trains: a function, a lambda, an object or a class."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence

from quark.errors import RewardError
from quark.rewards.callable import awaited, checked
from quark.rewards.code_identity import code_content
from quark.rewards.config import GIVEN_PREFIX
from quark.rewards.fields import FieldsAsked, fields_of_function
from quark.types import Json


class GivenReward:
    """Calls an object as ``object(prompts=..., completions=...)`` and returns the result unchecked.

    Further parameters are fields of the prompts' rows (``quark.rewards.fields``). Of a class, one object is made, without arguments. An ``async`` function runs in an event loop of its own.
    """

    def __init__(self, target: object) -> None:
        """Take ``target``.

        Raises:
            RewardError: It cannot be called with ``prompts`` and ``completions``, or is a class that needs arguments.
        """
        name = _name_of(target)
        if isinstance(target, type):
            try:
                target = target()
            except Exception as err:
                raise RewardError(
                    f"{name}() failed: {type(err).__name__}: {err}. Pass an object instead of the class"
                ) from err
        self._function = checked(target, f"the reward {name}")
        self.fields_asked: FieldsAsked = fields_of_function(target)
        """Fields of the prompts' rows that the object asks for."""
        self._name = name
        self._details: Mapping[str, Json] = getattr(target, "provenance", {})
        self.files: Mapping[str, str] = {} if self._details else code_content(target)
        """SHA-256 of its code by function or class; empty if nothing is known of it, or the object says it itself."""

    @property
    def name(self) -> str:
        """The object's ``name`` if that is a string, else the name that its code has."""
        return self._name

    @property
    def setting(self) -> str:
        """The value of ``reward.name`` that stands for it."""
        return GIVEN_PREFIX + self._name

    @property
    def provenance(self) -> Mapping[str, Json]:
        """The identity of the code."""
        said = {"reference": self.setting, **self._details}
        return {**said, "files": dict(self.files)} if self.files else said

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **fields: Sequence[Json]
    ) -> Sequence[float | None]:
        """Call the object once with the whole batch; if it is asynchronous, run it to its end."""
        scores = self._function(prompts=prompts, completions=completions, **fields)
        return awaited(scores) if inspect.iscoroutine(scores) else scores


def _name_of(target: object) -> str:
    name = getattr(target, "name", None)
    if not isinstance(name, str):
        name = str(getattr(target, "__name__", type(target).__name__))
    return re.sub(r"[^\w.<>-]", "_", name)[:64] or "reward"
