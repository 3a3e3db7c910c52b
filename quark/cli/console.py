"""The only way from quark to a terminal.

Results go to stdout, the way there (progress, messages, errors) to stderr. Markup, emoji codes,
hyperlinks and automatic highlighting are off: text from a model or a file is passed through
``printable`` and put into ``Text`` objects, so that it can neither act on the terminal nor style itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from quark.printable import counted as counted
from quark.printable import printable, printable_lines

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_LINE_MODE_WIDTH = 100
_EMPTY, _BLANK = "(empty)", "(blank)"
_SHOWN_CHARACTERS = 2000


def make_console(stream: IO[str] | None = None, *, width: int | None = None) -> Console:
    """A console with every interpretation of text switched off.

    Args:
        stream: where to write; stdout when None.
        width: columns; the terminal's (or ``COLUMNS``, or 100 for a pipe) when None.
    """
    from rich.console import Console

    target = sys.stdout if stream is None else stream
    if width is None and not target.isatty():
        width = columns_asked_for() or _LINE_MODE_WIDTH
    elif width is None:
        width = shutil.get_terminal_size((80, 24)).columns or _LINE_MODE_WIDTH
    return Console(
        file=target, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False
    )


def columns_asked_for() -> int | None:
    """The width that ``COLUMNS`` sets; None if it is unset or not a number."""
    text = os.environ.get("COLUMNS", "")
    return int(text) if re.fullmatch(r"[1-9][0-9]{0,4}", text) else None


def foreign(text: str, *, limit: int | None = None, style: str = "") -> Text:
    """Make text that quark did not write safe to render."""
    from rich.text import Text

    return Text(printable(text, limit=limit), style=style)


def continued(prompt: str, completion: str) -> Text:
    """A prompt, dimmed, followed by its completion, as one text."""
    if not completion.strip():
        prompt += " "
    return foreign(prompt, limit=_SHOWN_CHARACTERS, style="dim").append_text(
        completed(completion, limit=_SHOWN_CHARACTERS, is_apart=False)
    )


def completed(completion: str, *, limit: int | None = None, is_apart: bool = True) -> Text:
    """A completion, or a placeholder if it has no visible text.

    Args:
        completion: foreign text.
        limit: characters to show at most.
        is_apart: it is shown alone, so leading and trailing spaces are not significant.
    """
    if not completion.strip():
        return foreign(_BLANK if completion else _EMPTY, style="italic dim")
    return foreign(completion.strip(" ") if is_apart else completion, limit=limit)


def prose(text: str, style: str = "") -> Text:
    """Text from quark itself, possibly with foreign parts; line breaks are kept."""
    from rich.text import Text

    return Text(printable_lines(text), style=style)


def heading(text: str) -> Text:
    """A section's title."""
    return prose(text, "bold cyan")


def figures(rows: Sequence[tuple[str, RenderableType | str]]) -> Table:
    """Names and values in two aligned columns."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(prose(name), prose(value) if isinstance(value, str) else value)
    return table


def grid(*columns: str, right: Sequence[int] = (), wide: Sequence[int] = ()) -> Table:
    """A table in the house style.

    Args:
        columns: titles.
        right: indices of right-aligned (numeric) columns.
        wide: indices of columns of running text, which share the width that is left.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for index, title in enumerate(columns):
        table.add_column(
            title,
            justify="right" if index in right else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if index in wide else None,
        )
    table.expand = bool(wide)
    return table


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people; NaN and None are a dash."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0 or 10**-digits <= abs(value) < 1e6:
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def count(value: int) -> str:
    """A whole number with separated thousands."""
    return f"{value:,}"


def size(num_bytes: int) -> str:
    """A number of bytes for people, in decimal units."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds as ``48 s``, ``3:07 min`` or ``2:05 h``."""
    if math.isnan(seconds) or math.isinf(seconds):
        return "–"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def bar(value: float, low: float, high: float, width: int) -> str:
    """``value`` between ``low`` and ``high`` as a horizontal bar of at most ``width`` cells."""
    if not math.isfinite(value) or high <= low:
        return ""
    eighths = round(min(max((value - low) / (high - low), 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def error_line(message: str, way_out: str | None = None) -> None:
    """Write ``error: message`` to stderr in red, followed by what to do about it."""
    from rich.text import Text

    console = make_console(sys.stderr)
    line = Text("error: ", style="bold red")
    line.append(printable_lines(message), style="red")
    console.print(line, soft_wrap=True)
    if way_out:
        console.print(prose("  try: " + way_out, "dim"), soft_wrap=True)


def to_json(value: Any) -> Any:  # noqa: ANN401 - anything that has a JSON form
    """``value`` in JSON's own types: NaN and infinities become None, paths text, arrays lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset | range):
        return [to_json(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, without importing NumPy here
        return to_json(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def prints_to_stderr() -> AbstractContextManager[object]:
    """Run the user's code with its output sent to stderr, because stdout is for the result."""
    return contextlib.redirect_stdout(sys.stderr)


def tell(text: str, *, level: Literal["info", "warning"] = "info") -> None:
    """Write a line about what goes on to stderr; its text may come from anywhere."""
    line = (
        foreign(f"warning: {text}", style="yellow")
        if level == "warning"
        else foreign(f"  {text}", style="dim")
    )
    make_console(sys.stderr).print(line, soft_wrap=True)


def print_json(value: Mapping[str, Any]) -> None:
    """Write exactly one JSON object to stdout, in ASCII, so that no character of it can act."""
    sys.stdout.write(json.dumps(to_json(value), allow_nan=False, indent=2) + "\n")
    sys.stdout.flush()
