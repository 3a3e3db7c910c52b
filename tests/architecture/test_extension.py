"""The Rust extension's house: no circles among its rooms, and a stub that says exactly what was built."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import quark
from quark._pool_rs import SAMPLE_COLUMNS
from quark.pool.base import Sample, SampleBatch
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.sample_columns import (
    BATCH_COLUMNS,
    FLOAT_COLUMNS,
    NUMBER_COLUMNS,
    PROVENANCE_COLUMNS,
)
from quark.pool.scan import COLUMNS
from quark.selftest.samples import make_batch
from tests.pool.batches import assert_same_content

PACKAGE = Path(quark.__file__).parent
SOURCES = PACKAGE.parent / "quark_pool_rs" / "src"
ROOMS = {path.stem for path in SOURCES.glob("*.rs")} - {"lib"} | {"python"}


def room_of(file: Path) -> str:
    return file.relative_to(SOURCES).parts[0].removesuffix(".rs")


def rooms_named_in(code: str) -> Iterator[str]:
    """Rooms after ``crate::``, in ``use`` lines and elsewhere. Unit tests lie at the end and may name any."""
    code = code.split("#[cfg(test)]\nmod tests {")[0]
    code = re.sub(r"//[^\n]*", "", code)
    yield from re.findall(r"\bcrate::(\w+)", code)
    for group in re.findall(r"\bcrate::\{(.*?)\};", code, flags=re.DOTALL):
        yield from re.findall(r"(?:^|,)\s*(\w+)", group)


def test_the_rooms_named_in_code_are_found() -> None:
    code = "use crate::a::B;\nuse crate::{c::D, e};\n// crate::f\n#[cfg(test)]\nmod tests {\nuse crate::g;"
    assert set(rooms_named_in(code)) == {"a", "c", "e"}


def test_no_rooms_of_the_extension_use_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {room: set() for room in ROOMS}
    for file in SOURCES.rglob("*.rs"):
        room = room_of(file)
        if room in graph:
            named = set(rooms_named_in(file.read_text(encoding="utf-8")))
            graph[room] |= (named & ROOMS) - {room}
    assert graph["segment"] >= {"columns", "datafile"}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def parameters_of(function: ast.FunctionDef) -> list[str]:
    """Names of the parameters, with * before those by keyword alone and = behind those with a default."""
    args = function.args
    given = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    optional = len(given) - len(args.defaults)
    named = [name + "=" * (at >= optional) for at, name in enumerate(given)]
    by_keyword = [
        f"*{arg.arg}" + "=" * (default is not None)
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return [name for name in named if name not in ("self", "cls")] + by_keyword


def built_parameters_of(function: object) -> list[str]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [
        "*" * (parameter.kind is parameter.KEYWORD_ONLY)
        + parameter.name
        + "=" * (parameter.default is not parameter.empty)
        for parameter in parameters
        if parameter.name != "self"
    ]


def test_the_stub_and_the_built_extension_say_the_same() -> None:
    extension = pytest.importorskip("quark._pool_rs", reason="the Rust extension is not built")
    stub = ast.parse((PACKAGE / "_pool_rs.pyi").read_text(encoding="utf-8"))
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    values = {ast.unparse(node.target) for node in stub.body if isinstance(node, ast.AnnAssign)}
    stated = {name for name in (*classes, *functions, *values) if not name.startswith("_")}
    assert stated == {name for name in dir(extension) if not name.startswith("_")}
    for name, function in functions.items():
        assert parameters_of(function) == built_parameters_of(getattr(extension, name)), name
    for name, node in classes.items():
        if name.startswith("_"):
            continue
        built = vars(getattr(extension, name))
        members = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        public = {member for member in built if not member.startswith("_")}
        assert {member for member in members if not member.startswith("_")} == public, name
        for member, item in members.items():
            assert member in built, f"{name} lacks {member}"
            is_property = any(ast.unparse(mark) == "property" for mark in item.decorator_list)
            assert inspect.isdatadescriptor(built[member]) == is_property, f"{name}.{member}"
            if not is_property:
                function = getattr(getattr(extension, name), member)
                assert parameters_of(item) == built_parameters_of(function), f"{name}.{member}"


def test_what_the_extension_answers_with_shows_its_attributes() -> None:
    extension = pytest.importorskip("quark._pool_rs", reason="the Rust extension is not built")
    [column] = [column for column in extension.SAMPLE_COLUMNS if column.name == "finish"]
    assert repr(column) == (
        "SampleColumn(name='finish', dtype='uint8', given='finish_reasons', shown='finish_reason', since=1, blank=0)"
    )
    with pytest.raises(AttributeError):
        column.name = "other"


def test_a_sample_and_a_batch_have_an_attribute_for_every_column_of_the_table() -> None:
    in_sample = {field.name for field in dataclasses.fields(Sample)}
    assert {column.shown for column in SAMPLE_COLUMNS} - {None} <= in_sample
    in_batch = {field.name for field in dataclasses.fields(SampleBatch)}
    assert {column.given for column in SAMPLE_COLUMNS} - {None} <= in_batch


def test_lists_of_columns_follow_the_table() -> None:
    numbers = [c for c in SAMPLE_COLUMNS if c.shown is not None and c.dtype is not None]
    assert list(PROVENANCE_COLUMNS) == [column.shown for column in numbers]
    assert {"reward_token": -1, "seed": 0}.items() <= {
        c.name: c.blank for c in NUMBER_COLUMNS
    }.items()
    for column in NUMBER_COLUMNS:
        scanned = pl.Series(np.array([column.blank], column.dtype))
        assert COLUMNS[column.name] == scanned.dtype, column.name


def declared_lists(code: str) -> Iterator[set[str]]:
    """The texts of each literal list, and the attributes that each class declares."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Dict):
            items: list[ast.expr | None] = node.keys
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            items = list(node.elts)
        elif isinstance(node, ast.ClassDef):
            targets = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            yield {target.id for target in targets if isinstance(target, ast.Name)}
            continue
        elif isinstance(node, ast.Call):
            yield {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            continue
        else:
            continue
        yield {item.value for item in items if isinstance(item, ast.Constant)} - {None}


MAY_LIST_COLUMNS = {
    "pool/base.py": "the attributes of Sample and SampleBatch",
    "selftest/samples.py": "random values for every column",
    "training/loop/exploration.py": "the values of sampled completions",
    "integrations/sink.py": "the values of rollouts",
    "interchange/importing.py": "the values of imported samples",
    "cli/pool.py": "the columns that a command shows",
    "cli/pool_explain.py": "the columns that a command shows",
    "view/sources.py": "the columns that the local page shows",
    "types.py": "a completion before it becomes a sample",
    "generation/transformers_generator.py": "a completion before it becomes a sample",
    "generation/http_generator.py": "a completion before it becomes a sample",
    "training/processes/data_parallel.py": "a completion before it becomes a sample",
    "cli/generate.py": "a completion before it becomes a sample",
}
"""Files that name several columns that come with an append. The first one declares them; the others fill or show some."""


def test_no_other_file_declares_the_columns_again() -> None:
    names = {column.name for column in BATCH_COLUMNS} | {column.given for column in BATCH_COLUMNS}
    assert list(declared_lists("x = {'seed': 1}; y = ('seed', 'key')")) == [
        {"seed"},
        {"seed", "key"},
    ]
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for listed in declared_lists(path.read_text(encoding="utf-8"))
        if len(listed & names) >= 3
    }
    assert found == MAY_LIST_COLUMNS.keys()


def test_an_append_may_leave_out_log_probabilities(tmp_path: Path) -> None:
    full = make_batch("a", {"reward": [0.5, 1.5]})
    logprobs = [column.given for column in BATCH_COLUMNS if column.dtype == np.float32]
    pools = [MemoryPool(vocab_size=1000), NativePool.create(tmp_path / "pool", vocab_size=1000)]
    for pool in pools:
        pool.append(dataclasses.replace(full, **dict.fromkeys(logprobs, None)))
        assert all(np.isnan(pool.column(name)).all() for name in FLOAT_COLUMNS)
    assert_same_content(pools[1], pools[0])
