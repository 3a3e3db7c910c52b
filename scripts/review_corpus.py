"""The cleaned corpus of product pros and cons that the embedded model, reward and prompts are made from.

Source: "Pros and cons dataset" by Bing Liu (Ganapathibhotla and Liu 2008; Liu, Hu and Cheng 2005),
CC BY 4.0, as JSON lines with the fields ``text`` and ``label`` (1 pro, 0 con).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

CORPUS_SHA256 = "3024cf78e4d2b11faee6a674d3169f5addc0120802cd1fbbf29ae3a521e9846c"

_MARKUP = re.compile(r"https?:|www\.|@|[<>{}\\]|&\w+;")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrase:
    """One distinct phrase; ``label`` is 1 for a pro and 0 for a con."""

    text: str
    label: int
    is_held_out: bool


def check_sha256(path: Path, expected: str) -> None:
    """Refuse any file but the one that the shipped assets were made from.

    Raises:
        SystemExit: The file has another SHA-256.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise SystemExit(f"{path}: SHA-256 is {found}, expected {expected}")


def clean(text: str) -> str:
    """Lower-case, with single spaces, a space after each comma and no runs of punctuation."""
    text = text.lower().replace("`", "'")
    text = re.sub(r"\.{2,}", "...", text)
    text = re.sub(r"([!?,;*-])\1+", r"\1", text)
    text = re.sub(r"\s+([,.;!?])", r"\1", text)
    text = re.sub(r"([,;])(?=[a-z])", r"\1 ", text)
    return " ".join(text.split())


def is_held_out(text: str, *, one_in: int = 20) -> bool:
    """Whether a text belongs to the share that nothing is trained on; a function of the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little") % one_in == 0


def load_phrases(path: Path, *, min_words: int = 2) -> list[Phrase]:
    """Read, clean and deduplicate: ASCII phrases of ``min_words`` to 24 words, in the file's order.

    A phrase given both as a pro and as a con keeps the label of its first appearance.
    """
    check_sha256(path, CORPUS_SHA256)
    phrases: dict[str, Phrase] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text = clean(row["text"])
            if (
                not text.isascii()
                or _MARKUP.search(text)
                or not min_words <= len(text.split()) <= 24
            ):
                continue
            if text not in phrases:
                phrases[text] = Phrase(
                    text=text, label=int(row["label"]), is_held_out=is_held_out(text)
                )
    return list(phrases.values())
