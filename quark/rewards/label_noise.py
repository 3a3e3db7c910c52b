"""Wrong labels on purpose: a proxy reward that a gold one can be compared with (Coste et al. 2024)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from quark.rewards.linear_training import LabelledText


def with_label_noise(
    examples: Sequence[LabelledText], share: float, *, seed: int
) -> list[LabelledText]:
    """The examples, a share of them with one minus their target.

    A hash of seed and text decides, so the members of an ensemble see the same wrong labels, and copies of a text
    are wrong together.

    Args:
        examples: labeled texts.
        share: of the texts whose label is flipped, from 0 to 1.
        seed: of the choice.
    """
    return [
        replace(example, target=1.0 - example.target)
        if _place(example.text, seed) < share
        else example
        for example in examples
    ]


def _place(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on text and seed alone."""
    digest = hashlib.sha256(f"label noise {seed} ".encode() + text.encode("utf-8", "replace"))
    return int.from_bytes(digest.digest()[:8], "little") / 2**64
