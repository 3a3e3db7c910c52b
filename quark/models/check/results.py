"""The result of checking a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Self, TypeAlias, get_args

from quark.errors import ModelError
from quark.formats import list_in, object_in, text_in
from quark.types import Json

State: TypeAlias = Literal["passed", "slower", "refused", "untried"]
"""``slower``: a slower way is correct and is taken. ``refused``: there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckFinding:
    """The result of one check."""

    name: str
    state: State
    detail: str
    """What was found, with its figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCheck:
    """The results of all checks of one model."""

    findings: tuple[CheckFinding, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: slower ways that are taken, and what was not tried."""
        return tuple(f.detail for f in self.findings if f.state in ("slower", "untried"))

    def require(self, name: str) -> None:
        """Refuse the model if a check does.

        Args:
            name: of the model.

        Raises:
            ModelError: names the model, the check and its figure.
        """
        for finding in self.findings:
            if finding.state == "refused":
                raise ModelError(
                    f"{name} fails the check '{finding.name}': {finding.detail}. `quark doctor --model {name}` shows "
                    "all checks"
                )

    def to_json(self) -> dict[str, Json]:
        """As JSON."""
        return {"findings": [dict(asdict(finding)) for finding in self.findings]}

    @classmethod
    def of_json(cls, value: Mapping[str, Json]) -> Self:
        """What ``to_json`` gave.

        Raises:
            ValueError, KeyError: it is something else.
        """
        findings = []
        for item in map(object_in, list_in(value["findings"])):
            name, state, detail = (text_in(item[key]) for key in ("name", "state", "detail"))
            known = next((s for s in get_args(State) if s == state), None)
            if known is None:
                raise ValueError(f"no state of a check: {state[:40]!r}")
            findings.append(CheckFinding(name=name, state=known, detail=detail))
        return cls(findings=tuple(findings))
