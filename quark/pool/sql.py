"""Restricts SQL to the pool: refuses unsafe text before polars parses it.

Polars accepts table functions such as ``read_csv('http://…')`` wherever a table may stand, even in a condition. This
module splits the text into tokens. Anything before a parenthesis must be an allowed word or function. Text whose
tokens depend on the SQL dialect is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import polars as pl

from quark.printable import printable

MAX_CHARACTERS = 1 << 16
"""Maximum length of a condition or a query."""
MAX_OPERATORS = 1000
"""Maximum number of operators (AND, OR, comparisons, arithmetic). The time of polars grows with their square."""
MAX_DEPTH = 32
"""Maximum depth of nested brackets."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPERATORS = _words("and or not is in like ilike rlike between case when xor div")
_BEFORE_BRACKETS = _OPERATORS | _words(
    """
    all anti any array as asc by cast char character cross cube date datetime desc distinct double else end
    escape except exclude exists extract false filter first float from full group having ignore inner intersect
    interval into join last lateral left limit natural nulls offset on outer over partition precision qualify
    recursive regexp respect right rollup select semi sets similar some then time timestamp to true try_cast
    union unique using values varchar where window with within
    """
)
"""Words of SQL that may come before a bracket. Those that are also functions open no files."""
_CONDITION_FUNCTIONS = _words(
    """
    abs acos acosd array_contains array_get array_length array_lower array_mean array_reverse array_sum
    array_unique array_upper asin asind atan atan2 atan2d atand avg bit_and bit_count bit_length bit_not bit_or
    bit_xor bitand bitcount bitnot bitor bitxor cbrt ceil ceiling char_length character_length coalesce corr cos
    cosd cot cotd count covar covar_pop covar_samp date_part date_trunc degrees dense_rank div ends_with erf
    erfc exp first first_value floor greatest if ifnull initcap lag last last_value lead least left length ln
    log log10 log1p log2 lower ltrim max median min mod ntile nullif octet_length pi pow power quantile_cont
    quantile_disc radians rank regexp_like right round row_number rtrim sign sin sind split_part sqrt
    starts_with stddev stddev_samp stdev stdev_samp strpos substr substring sum tan tand total trim trunc
    truncate upper var var_samp variance
    """
)
"""Functions whose values are not larger than their arguments."""
_QUERY_FUNCTIONS = _CONDITION_FUNCTIONS | _words(
    """
    approx_quantile array_agg array_to_string columns concat concat_ws cume_dist current_date current_time
    current_timestamp day dayofweek dayofyear decimal generate_series group_concat grouping grouping_id hour
    listagg localtime localtimestamp lpad minute month normalize now nth_value numeric overlay percent_rank
    position quarter range regexp_replace rename replace reverse rpad second strftime string_agg string_to_array
    strptime struct unnest week year
    """
)
_SUBQUERY_WORDS = frozenset({"select", "table", "values", "with"})
_QUERY_BEGINS = frozenset({"explain", "from", "select", "show", "values", "with"})

_TOKEN = re.compile(
    r"""
      (?P<comment>--[^\n]*|/\*(?:(?!\*/|/\*).)*\*/)
    | (?P<string>'(?:[^']|'')*+')
    | (?P<name>"(?:[^"]|"")*+"|`(?:[^`]|``)*+`)
    | (?P<word>[^\W\d]\w*)
    | (?P<number>\d[\d.]*)
    | (?P<operator>[-+*/%<>=!|&^~?:@]+?(?=--|/\*)|[-+*/%<>=!|&^~?:@]+)
    | (?P<bracket>[()\[\]{}])
    | (?P<other>[,;.])
    | (?P<space>\s+)
    """,
    re.VERBOSE | re.DOTALL,
)


def condition(sql: str, columns: Collection[str]) -> pl.Expr:
    """Parse an SQL expression over some columns that opens no file and creates no large value.

    Raises:
        ValueError: It is not such an expression, names another column, or exceeds a limit. The message is one line
            that begins with a verb.
    """
    tokens = _checked(sql, _CONDITION_FUNCTIONS, naming=())
    for token in tokens:
        if token.kind == "word" and token.value in _SUBQUERY_WORDS:
            raise ValueError(
                f"has a subquery ({token.value.upper()}); a condition is about a sample"
            )
    try:
        expression = pl.sql_expr(sql)
        names = expression.meta.root_names()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ValueError(f"is no SQL expression: {reason_of(error)}") from error
    if unknown := sorted(set(names).difference(columns)):
        raise ValueError(
            f"names {printable(', '.join(unknown), limit=200)}; there are {', '.join(columns)}"
        )
    return expression


def check_query(sql: str, *, may_open_files: bool = False) -> None:
    """Refuse text that is not a query. Unless ``may_open_files``, also refuse queries that could open files.

    Raises:
        ValueError: The text is refused. The message is one line.
    """
    functions = None if may_open_files else _QUERY_FUNCTIONS
    try:
        tokens = _checked(sql, functions, naming=("as", "with"))
    except _UnknownFunctionError as error:
        raise ValueError(f"the query {error}; --allow-files permits every function") from error
    except ValueError as error:
        raise ValueError(f"the query {error}") from error
    first = next((token for token in tokens if token.kind == "word"), None)
    if first is not None and first.value not in _QUERY_BEGINS:
        raise ValueError(
            f"{first.value.upper()} is not a query: this command only reads; begin with SELECT or WITH"
        )


def reason_of(error: BaseException) -> str:
    """The error message of polars as one line, without the query plan."""
    return printable(str(error).split("\n\n", maxsplit=1)[0], limit=300)


class _UnknownFunctionError(ValueError):
    """A function that may open files is called."""


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    value: str
    """A word in lower case; other tokens as written."""


def _checked(
    sql: str, functions: Collection[str] | None, *, naming: Collection[str]
) -> list[_Token]:
    """The tokens of ``sql``, without spaces and comments.

    ``functions`` lists the allowed functions; None allows all. After a word in ``naming``, a new name with a list of
    columns may follow.
    """
    if len(sql) > MAX_CHARACTERS:
        raise ValueError(f"has {len(sql):,} characters; the most is {MAX_CHARACTERS:,}")
    tokens = list(_tokens(sql))
    depth = num_operators = 0
    before = None
    for token, following in pairwise([*tokens, _Token("end", "")]):
        if token.value in ("(", "[", "{"):
            depth += 1
        elif token.value in (")", "]", "}"):
            depth -= 1
        num_operators += token.kind == "operator" or (
            token.kind == "word" and token.value in _OPERATORS
        )
        if depth > MAX_DEPTH:
            raise ValueError(f"has brackets more than {MAX_DEPTH} levels deep")
        if num_operators > MAX_OPERATORS:
            raise ValueError(
                f"has more than {MAX_OPERATORS:,} operators; a list, as in x IN (1, 2), counts once"
            )
        is_called = following.value == "(" and token.kind in ("word", "name")
        is_known = token.kind == "word" and (
            functions is None or token.value in _BEFORE_BRACKETS or token.value in functions
        )
        if is_called and not is_known and functions is not None and before not in naming:
            raise _UnknownFunctionError(
                f"calls {printable(token.value, limit=80)}, which is not among the functions that may be called"
            )
        before = token.value if token.kind == "word" else None
    return tokens


def _tokens(sql: str) -> Iterator[_Token]:
    at = 0
    before = None
    while at < len(sql):
        found = _TOKEN.match(sql, at)
        if found is None:
            raise ValueError(
                f"has {printable(sql[at], limit=8)!r} at character {at + 1}, which begins or ends nothing"
            )
        kind, text = str(found.lastgroup), found[0]
        at = found.end()
        is_quoted = kind in ("string", "name")
        if kind == "operator" and "/*" in text:
            raise ValueError(
                f"has a comment at character {found.start() + 1} that does not end, or holds another"
            )
        is_ambiguous = (
            # A prefix, as in E'…' and Q'…', or a backslash before a quote can change where a text ends.
            (is_quoted and before in ("word", "number"))
            or (is_quoted and re.search(r"\\['\"`]", text))
            # Some dialects execute comments with a mark, or end comments at a carriage return.
            or (kind == "comment" and (text[2:3] in ("!", "+") or "\r" in text[:-1]))
        )
        if is_ambiguous:
            raise ValueError(
                f"has {printable(text, limit=20)} at character {found.start() + 1}, which dialects read differently"
            )
        before = kind
        if kind not in ("comment", "space"):
            yield _Token(kind, text.lower() if kind == "word" else text)
