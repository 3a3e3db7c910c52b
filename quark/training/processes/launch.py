"""Reads the environment variables of a launcher such as ``torchrun``, without importing torch."""

from __future__ import annotations

import os

from quark.errors import ConfigError


def rank_of_process() -> int:
    """The rank of this process from its launcher; 0 without a launcher. Starts nothing."""
    return number_of("RANK", 0) if number_of("WORLD_SIZE", 1) > 1 else 0


def number_of(name: str, default: int) -> int:
    """A number from the environment; ``default`` if it is not set.

    Raises:
        ConfigError: it is not a number.
    """
    text = os.environ.get(name, "") or str(default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment's {name} is {text!r}, not a number") from None
