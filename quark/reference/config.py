"""The configuration of the reference."""

from __future__ import annotations

from typing import Literal

from quark.settings import Settings


class ReferenceConfig(Settings):
    """How the original model comes into training steps."""

    cache: Literal["off", "hidden"] = "off"
    """``hidden`` runs it once on each sample and keeps its last hidden states in half precision in the run directory, for
    every later step that draws the sample. Pays where samples are drawn several times; see docs/memory.md."""
