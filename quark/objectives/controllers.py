"""Coefficients of the loss: fixed, or adapted to a target."""

from __future__ import annotations

from typing import Literal, Protocol


class Coefficient(Protocol):
    """A factor that may change during training."""

    @property
    def value(self) -> float:
        """The factor as it is now."""
        ...

    def update(self, measured: float, *, num_sequences: int) -> None:
        """Take in a figure measured over ``num_sequences`` sequences."""
        ...

    def state_dict(self) -> dict[str, float]:
        """The value under the key ``value``, for a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the value from the result of ``state_dict``."""
        ...


class FixedCoefficient:
    """A constant."""

    def __init__(self, value: float) -> None:
        self._value = value

    @property
    def value(self) -> float:
        """The constant."""
        return self._value

    def update(self, measured: float, *, num_sequences: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float]:
        """The constant under the key ``value``."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Replace the constant with the saved one."""
        self._value = float(state["value"])


class AdaptiveCoefficient:
    """Proportional control in log space (Ziegler et al. 2019, section 2.2).

    error = clip(measured / target - 1, -0.2, 0.2); value *= 1 + error * min(num_sequences /
    horizon, 1). Without the bound, which the source lacks, many sequences at once could turn the
    value to 0, where it would stay.

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
        """The factor after all updates so far."""
        return self._value

    def update(self, measured: float, *, num_sequences: int) -> None:
        """Scale the value by the clipped relative distance of ``measured`` from the target."""
        error = min(max(measured / self._target - 1.0, -self.CLIP), self.CLIP)
        self._value *= 1.0 + self._sign * error * min(num_sequences / self._horizon, 1.0)

    def state_dict(self) -> dict[str, float]:
        """The current value under the key ``value``; the target and the horizon are not part of the state."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from the saved value."""
        self._value = float(state["value"])
