"""Identifies code that is an object in memory, by its content: its syntax, or its bytecode where there is no source.

Constants, default values, plain values of a closure, and the user's own functions and classes that the code uses
count as well. Lists, dictionaries and other objects that can change do not.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import linecache
import sys
import types
from collections.abc import Iterator, Mapping

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def code_content(target: object) -> Mapping[str, str]:
    """SHA-256 of the code behind a callable, by the name of each function or class; empty if nothing is known of it.

    >>> list(code_content(lambda *, prompts, completions: [0.0 for _ in completions]))
    ['<lambda>']
    """
    digests: dict[str, str] = {}
    seen: set[int] = set()
    waiting = [target]
    while waiting:
        item = waiting.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, types.FunctionType):
            text, used = _of_function(item)
        elif isinstance(item, type):
            text, used = _of_class(item)
        else:
            text, used = _of_object(item)
        waiting += [other for other in used if other is target or _is_own(other)]
        if text:
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
            digests[_free_name(_name_of(item), digests)] = digest
    return digests


def _name_of(item: object) -> str:
    name = getattr(item, "__qualname__", type(item).__qualname__)
    return str(name).rpartition("<locals>.")[2]


def _free_name(name: str, taken: Mapping[str, str]) -> str:
    number = sum(known.partition("#")[0] == name for known in taken)
    return f"{name}#{number + 1}" if number else name


def _of_function(function: types.FunctionType) -> tuple[str, list[object]]:
    code = function.__code__
    known_names = (name for name in _names(code) if name in function.__globals__)
    values = {name: function.__globals__[name] for name in known_names}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it is not filled yet
            values[name] = cell.cell_contents
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    known = [f"{name}={value!r}" for name, value in sorted(values.items()) if _is_plain(value)]
    known += [repr(value) for value in defaults if _is_plain(value)]
    return "\n".join([_syntax(code) or _bytecode(code), *known]), list(values.values())


def _of_class(kind: type) -> tuple[str, list[object]]:
    own = [(name, _unwrapped(value)) for name, value in sorted(vars(kind).items())]
    methods = [value for _, value in own if isinstance(value, types.FunctionType)]
    parts = [_of_function(method) for method in methods]
    texts = [f"{name}={value!r}" for name, value in own if _is_plain(value) and name[:2] != "__"]
    texts += [text for text, _ in parts]
    used = [other for _, others in parts for other in others]
    return "\n".join(texts), [*kind.__bases__, *used]


def _of_object(item: object) -> tuple[str, list[object]]:
    """An object that can be called: a bound method, a partial, or an instance of a class."""
    if isinstance(item, types.MethodType):
        return "", [item.__func__, item.__self__]
    if isinstance(item, functools.partial):
        values: list[object] = [*item.args, *item.keywords.values()]
        text = repr([value for value in [*item.args, *item.keywords.items()] if _is_plain(value)])
        return text, [item.func, *values]
    if isinstance(item, types.BuiltinFunctionType):
        return "", []
    attributes = getattr(item, "__dict__", {})
    plain = [f"{name}={value!r}" for name, value in sorted(attributes.items()) if _is_plain(value)]
    return "\n".join(plain), [type(item), *attributes.values()]


def _unwrapped(value: object) -> object:
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def _is_plain(value: object) -> bool:
    """Whether ``repr`` says all of a value, which cannot change."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _is_own(item: object) -> bool:
    """Whether this is a function or class of the user's, or an object of such a class."""
    if isinstance(item, types.MethodType | functools.partial):
        return True
    kind = item if isinstance(item, types.FunctionType | type) else type(item)
    module = getattr(kind, "__module__", None) or "builtins"
    top = module.partition(".")[0]
    if module == "__main__":
        return True
    if top in sys.stdlib_module_names or top == "quark":
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return not any(part in file for part in ("site-packages", "dist-packages"))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _syntax(code: types.CodeType) -> str | None:
    """The source without comments and layout; None if it is not known, or two lambdas share a line."""
    source = "".join(linecache.getlines(code.co_filename))
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    found = [node for node in ast.walk(tree) if _first_line(node) == code.co_firstlineno]
    found = [node for node in found if getattr(node, "name", "<lambda>") == code.co_name]
    return ast.unparse(found[0]) if len(found) == 1 else None


def _first_line(node: ast.AST) -> int | None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
    return node.lineno if isinstance(node, ast.Lambda) else None


def _bytecode(code: types.CodeType) -> str:
    constants = map(_constant, code.co_consts)
    return "\n".join([code.co_code.hex(), repr(code.co_names), repr(code.co_varnames), *constants])


def _constant(value: object) -> str:
    if isinstance(value, types.CodeType):
        return _bytecode(value)
    # The order of a set of texts differs from process to process.
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
