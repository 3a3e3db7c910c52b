"""The configuration of the reference."""

from __future__ import annotations

from typing import Literal

from quark.settings import Settings


class ReferenceConfig(Settings):
    """How training steps use the original model."""

    cache: Literal["off", "hidden"] = "off"
    """``hidden`` runs it once on each sample and keeps its last hidden states in half precision in
    the run directory, for later steps that draw the sample. Pays off if samples are drawn several
    times; see docs/memory.md."""
