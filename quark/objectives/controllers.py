"""Coefficients of the loss: fixed, or driven towards a target."""

from __future__ import annotations

from typing import Literal, Protocol


class Coefficient(Protocol):
    """A factor that may move as training goes on."""

    @property
    def value(self) -> float: ...

    def update(self, measured: float, *, num_sequences: int) -> None:
        """Take in a figure measured over ``num_sequences`` sequences."""
        ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


class FixedCoefficient:
    """A constant."""

    def __init__(self, value: float) -> None:
        self._value = value

    @property
    def value(self) -> float:
        return self._value

    def update(self, measured: float, *, num_sequences: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._value = float(state["value"])


class AdaptiveCoefficient:
    """Proportional control in log space (Ziegler et al. 2019, section 2.2).

    error = clip(measured / target - 1, -0.2, 0.2); value *= 1 + error * num_sequences / horizon.

    Args:
        initial: first value, > 0.
        target: what the measured figure shall become, > 0.
        horizon: in sequences; the larger, the slower.
        grows_when: ``above`` for a penalty (KL), ``below`` for a bonus (entropy).
    """

    CLIP = 0.2

    def __init__(
        self,
        initial: float,
        *,
        target: float,
        horizon: float,
        grows_when: Literal["above", "below"] = "above",
    ) -> None:
        self._value = initial
        self._target = target
        self._horizon = horizon
        self._sign = 1.0 if grows_when == "above" else -1.0

    @property
    def value(self) -> float:
        return self._value

    def update(self, measured: float, *, num_sequences: int) -> None:
        error = min(max(measured / self._target - 1.0, -self.CLIP), self.CLIP)
        self._value *= max(0.0, 1.0 + self._sign * error * num_sequences / self._horizon)

    def state_dict(self) -> dict[str, float]:
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._value = float(state["value"])
