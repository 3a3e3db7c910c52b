from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quark.printable import NEWLINE_MARK, printable, printable_lines
from tests.hostile_text import HOSTILE


def assert_harmless(text: str) -> None:
    assert text.isprintable()
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)
    text.encode("utf-8")  # no lone surrogate is left


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_becomes_one_harmless_line(text: str) -> None:
    assert_harmless(printable(text))


@given(st.text(alphabet=st.characters(codec=None)))
def test_any_text_becomes_one_harmless_line(text: str) -> None:
    assert_harmless(printable(text))


@given(st.text(alphabet=st.characters(codec=None)), st.integers(1, 30))
def test_a_limit_is_kept(text: str, limit: int) -> None:
    shown = printable(text, limit=limit)
    assert len(shown) <= limit
    assert_harmless(shown)


@given(st.text(alphabet=st.characters(codec="ascii", exclude_categories=("Cc",))))
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_languages_and_emoji_stay_readable() -> None:
    for text in ("Größe, naïve, ‘quoted’ – 漢字 עברית हिन्दी ★ 🙂", "e\u0301 a\u0323\u0302"):
        assert printable(text) == text


def test_newlines_are_visible_and_tabs_are_spaces() -> None:
    assert printable("a\r\nb\nc\td") == f"a{NEWLINE_MARK}b{NEWLINE_MARK}c d"
    assert printable_lines("a\nb\x1b") == "a\nb\\x1b"


def test_escapes_name_the_character() -> None:
    assert printable("\x1b\x9b\u202e\U000e0041\ud800") == r"\x1b\x9b\u202e\U000e0041\ud800"


def test_piled_up_marks_are_escaped_beyond_a_few() -> None:
    assert printable("z" + "\u0334" * 10).count("\u0334") == 4


def test_a_long_text_is_cut_before_it_is_worked_on() -> None:
    assert printable("\x1b" * 10_000_000, limit=8) == "\\x1b\\x1" + "…"
