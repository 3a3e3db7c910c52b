"""The fields of a prompt's row that a reward asks for by name, beside prompts and completions.

A reward asks by the parameters of its function: ``def exact(*, prompts, completions, answer)`` gets a list with the
``answer`` of each row. With ``answer=None``, a row without an answer gives None. A parameter with another default is a
setting of the function and is left alone. A reward of quark's own says what it asks for in an attribute ``fields_asked``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from quark.errors import DataError
from quark.rewards.base import RewardFunction
from quark.types import Json

TEXTS = ("prompts", "completions")
"""What every reward gets. Fields of these names never reach it."""
Fields = Mapping[str, Sequence[Json]]
"""Name -> one value per completion; None for a row without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldsAsked:
    """The fields that a reward asks for."""

    required: frozenset[str] = frozenset()
    """Each row must have a value for them."""
    optional: frozenset[str] = frozenset()
    """A row without a value for them gives None."""
    asks_for_all: bool = False
    """Any other field that a row of the batch has is optional."""
    settings: frozenset[str] = frozenset()
    """Names that the function has settings for. No field may have them."""
    way_out: str = "give the function's parameter the default None"
    """How a user makes a required field optional."""

    def __or__(self, other: FieldsAsked) -> FieldsAsked:
        """What two rewards ask for together."""
        return FieldsAsked(
            required=self.required | other.required,
            optional=self.optional | other.optional,
            asks_for_all=self.asks_for_all or other.asks_for_all,
            settings=self.settings | other.settings,
        )

    @property
    def are_any(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.required or self.optional or self.asks_for_all)

    def lacking(self, row: Mapping[str, Json]) -> str | None:
        """A required field that ``row`` has no value for; None if it has all."""
        return next((name for name in sorted(self.required) if row.get(name) is None), None)

    def columns(self, rows: Sequence[Mapping[str, Json]]) -> dict[str, list[Json]]:
        """The fields of ``rows`` that are passed on."""
        names = self.required | self.optional
        if self.asks_for_all:
            names = names.union(*rows) - self.settings - {*TEXTS}
        return {name: [row.get(name) for row in rows] for name in sorted(names)}

    def among(self, fields: Fields) -> dict[str, Sequence[Json]]:
        """Those of ``fields`` that are asked for."""
        asked = self.required | self.optional
        return {
            name: values for name, values in fields.items() if self.asks_for_all or name in asked
        }


NO_FIELDS = FieldsAsked()


def fields_asked(reward: RewardFunction) -> FieldsAsked:
    """The fields that ``reward`` declares; none by default."""
    asked = getattr(reward, "fields_asked", NO_FIELDS)
    return asked if isinstance(asked, FieldsAsked) else NO_FIELDS


def fields_of_function(function: object) -> FieldsAsked:
    """What a function asks for by its parameters.

    A parameter without a default is required, one whose default is None is optional, one with another default is the
    function's own, and ``**`` takes all.
    """
    if isinstance(asked := getattr(function, "fields_asked", None), FieldsAsked):
        return asked
    if not callable(function):
        return NO_FIELDS
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a built-in without a signature
        return NO_FIELDS
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: p for p in parameters if p.kind in by_name and p.name not in TEXTS}
    required = frozenset(n for n, p in named.items() if p.default is inspect.Parameter.empty)
    optional = frozenset(name for name, p in named.items() if p.default is None)
    return FieldsAsked(
        required=required,
        optional=optional,
        settings=frozenset(named) - required - optional,
        asks_for_all=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
    )


def call_with(
    reward: RewardFunction, prompts: Sequence[str], completions: Sequence[str], fields: Fields
) -> Sequence[float | None]:
    """Call ``reward`` with the texts and with ``fields``, which it must ask for."""
    function: Callable[..., Sequence[float | None]] = reward
    return function(prompts=prompts, completions=completions, **fields)


def require_fields(reward: RewardFunction, rows: Iterable[tuple[str, Mapping[str, Json]]]) -> None:
    """Check that each row has a value for what ``reward`` requires, and no field that is named like a setting of it.

    Args:
        reward: will score completions of these rows.
        rows: the place of each, for the message, and its fields.

    Raises:
        DataError: a row lacks a field (names place and field, and says how many lack one), or has an ambiguous one.
    """
    asked = fields_asked(reward)
    if not (asked.required or asked.settings):
        return
    first: str | None = None
    num_rows = num_lacking = 0
    for place, row in rows:
        num_rows += 1
        if ambiguous := sorted(asked.settings.intersection(row)):
            raise DataError(
                f"{place}: the row has a field {ambiguous[0]!r}, and the reward {reward.name} has a setting of that name: "
                "give its parameter the default None to get the field, or rename one of them"
            )
        name = asked.lacking(row)
        if name is None:
            continue
        num_lacking += 1
        if first is None:
            known = ", ".join(sorted(row)) or "no other fields"
            found = "no value in the field" if name in row else "no field"
            first = f"{place}: {found} {name!r}, which the reward {reward.name} asks for (the row has: {known})"
    if first is not None:
        raise DataError(
            f"{first}. {num_lacking:,} of {num_rows:,} rows lack a field: add it to them, or {asked.way_out}"
        )
