"""Text from a model, a prompt, a file or a remote service, made safe to show.

``printable`` is the one function between such text and a terminal, a log line or the report. What it returns is one
line, acts on nothing and hides nothing: every character that a terminal could obey, or that a reader
could not see, becomes a visible escape.
"""

from __future__ import annotations

from unicodedata import category

NEWLINE_MARK = "↵"
ELLIPSIS = "…"

_INVISIBLE = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F),  # combining grapheme joiner
        (0x115F, 0x1160),  # Hangul fillers
        (0x17B4, 0x17B5),  # Khmer inherent vowels
        (0x180B, 0x180F),  # Mongolian variation selectors
        (0x2800, 0x2800),  # blank Braille pattern
        (0x3164, 0x3164),  # Hangul filler
        (0xFE00, 0xFE0F),  # variation selectors
        (0xFFA0, 0xFFA0),  # half-width Hangul filler
        (0xE0100, 0xE01EF),  # variation selectors supplement
    )
    for code in range(first, last + 1)
)
"""Printable by Unicode's category, and yet nothing to see."""

_MAX_MARKS = 4
"""Combining marks in a row that are shown as such: more than any language stacks."""


def printable(text: str, *, limit: int | None = None) -> str:
    r"""Return ``text`` as one harmless line.

    Newlines become a visible mark, tabs and exotic spaces a space; control characters (C0, DEL, C1),
    bidirectional controls, zero-width and other format characters, lone surrogates, unassigned code
    points and piled-up combining marks become escapes.

    Args:
        text: anything.
        limit: most characters to return; a cut is marked with an ellipsis.

    >>> printable("fine\n\x1b[2Jbad\u202e")
    'fine↵\\x1b[2Jbad\\u202e'
    """
    cut = text if limit is None else text[: limit + 1]
    if not (cut.isascii() and cut.isprintable()):
        cut = _visible(cut)
    if limit is not None and len(cut) > limit:
        return cut[: max(limit - 1, 0)] + ELLIPSIS
    return cut


def printable_lines(text: str) -> str:
    """Return ``text`` with its line breaks kept and every line made harmless."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _visible(text: str) -> str:
    shown: list[str] = []
    marks = 0
    for character in text.replace("\r\n", "\n"):
        kind = category(character)
        marks = marks + 1 if kind in ("Mn", "Me") else 0
        if character == "\n":
            shown.append(NEWLINE_MARK)
        elif character == "\t" or kind == "Zs":
            shown.append(" ")
        elif not character.isprintable() or character in _INVISIBLE or marks > _MAX_MARKS:
            shown.append(_escape(ord(character)))
        else:
            shown.append(character)
    return "".join(shown)


def _escape(code: int) -> str:
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def counted(number: int, noun: str) -> str:
    """A whole number of things: "1 round", "2,000 rounds"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
