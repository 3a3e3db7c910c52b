"""The base of every configuration section, and messages about values that do not fit.

A setting is declared in the module that uses it, as a field of a ``Settings`` subclass there;
``quark.config.schema`` only composes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

_SHOWN = 80


class Settings(BaseModel):
    """A frozen, validated section of the configuration; unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """One value that does not fit its setting."""

    key: str
    """Dotted; empty where the settings do not fit together."""
    value: str
    """As Python shows it, cut to 80 characters; empty where there is none."""
    expected: str
    """A phrase that begins with a verb (``must be a whole number``), or a sentence of quark's own."""
    is_unknown: bool
    """There is no setting of that name."""

    def __str__(self) -> str:
        if not self.value:
            return f"{self.key} {self.expected}".strip()
        return f"{self.key} = {self.value}: {self.expected}" if self.key else self.expected


def misfits(error: ValidationError) -> list[Misfit]:
    """What does not fit, in the words of the configuration's documents instead of the library's."""
    return [_misfit(details) for details in error.errors(include_url=False)]


def _misfit(details: Any) -> Misfit:  # noqa: ANN401 - pydantic's error details
    kind, location = details["type"], details["loc"]
    value = _shown(details["input"])
    if kind == "missing" and isinstance(location[-1], int):
        kind, location = "too_few", location[:-1]  # of a list, which is the input
    elif kind == "missing":
        value = ""
    return Misfit(
        key=".".join(str(part) for part in location),
        value=value,
        expected=_expected(kind, details.get("ctx", {}), details["msg"]),
        is_unknown=kind == "extra_forbidden",
    )


def _expected(kind: str, context: Mapping[str, Any], message: str) -> str:
    match kind:
        case "value_error":
            return message.removeprefix("Value error, ")
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "int_type" | "int_parsing" | "int_from_float":
            return "must be a whole number"
        case "int_parsing_size":
            return "has too many digits"
        case "float_type" | "float_parsing":
            return "must be a number"
        case "finite_number":
            return "must be a finite number"
        case "string_type" | "path_type":
            return "must be a text in quotes"
        case "literal_error" | "enum":
            return f"must be {context['expected']}"
        case "greater_than":
            return f"must be greater than {context['gt']}"
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "less_than":
            return f"must be less than {context['lt']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "tuple_type" | "list_type":
            return "must be a list, as in [1, 2]"
        case "missing":
            return "is missing"
        case "too_few":
            return "has too few values"
        case "too_long":
            return f"has more than {_counted(context['max_length'], 'value')}"
        case "too_short":
            return f"has fewer than {_counted(context['min_length'], 'value')}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "must be a table of settings, not one value"
        case "string_unicode":
            return "is not valid Unicode"
        case "json_invalid":
            return f"is not JSON: {context['error']}"
        case "extra_forbidden":
            return "is unknown"
    return message[:1].lower() + message[1:]


def _counted(value: int, noun: str) -> str:
    return f"{value} {noun}" + ("" if value == 1 else "s")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return "..."
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
