"""No pickle anywhere: neither by import, nor through torch, NumPy or joblib."""

import ast
from pathlib import Path

import pytest

import quark

PACKAGE = Path(quark.__file__).parent
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
}
FORBIDDEN_CALLS = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load")}


def violations(tree: ast.AST):
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (n.name for n in names if n.name.split(".")[0] in FORBIDDEN_MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_MODULES:
                yield module
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (
                owner,
                name,
            ) in FORBIDDEN_CALLS:
                yield f"{owner}.{name}"
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                yield "trust_remote_code=True"
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                yield "allow_pickle=True"


def test_the_audit_finds_what_it_looks_for():
    source = "import pickle\nfrom joblib import load\ntorch.load(f)\nnp.load(f, allow_pickle=True)"
    assert len(list(violations(ast.parse(source)))) == 5  # np.load and its keyword count apart


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_file_uses_no_pickle(path):
    assert list(violations(ast.parse(path.read_text(encoding="utf-8")))) == []
