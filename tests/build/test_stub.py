"""The stub `_core.pyi` against the compiled module: the same names, and the same parameters of every function."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from nanobraid import _core

STUB = Path(__file__).parents[2] / "python" / "nanobraid" / "_core.pyi"

CONTEXT_MANAGER = ("__enter__", "__exit__")

Functions = dict[str, list[str]]


def stub_parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    if arguments.kwonlyargs:
        names += ["*", *(argument.arg for argument in arguments.kwonlyargs)]
    return [name for name in names if name != "self"]


def read_stub(source: str) -> tuple[Functions, set[str]]:
    """Parameters by qualified name, and every name that is not a function (classes, properties, constants)."""
    functions: Functions = {}
    others: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                others.add(prefix + node.name)
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                if any(isinstance(item, ast.Name) and item.id == "property" for item in node.decorator_list):
                    others.add(prefix + node.name)
                else:
                    functions[prefix + node.name] = stub_parameters(node)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                others.add(prefix + node.target.id)

    visit(ast.parse(source).body, "")
    return functions, others


def documented_parameters(function: Any) -> list[str]:
    """Parameter names from the signature that pybind11 writes at the top of a docstring."""
    signature = str(function.__doc__).splitlines()[0]
    found = re.search(r"\((.*)\) -> ", signature)
    assert found, signature
    # Commas inside brackets belong to types.
    depth, names, current = 0, [], ""
    for character in found.group(1) + ",":
        depth += (character in "[({") - (character in "])}")
        if character == "," and depth == 0:
            names.append(current.split(":", maxsplit=1)[0].strip())
            current = ""
        else:
            current += character
    return [name for name in names if name and name != "self"]


def read_module(module: Any) -> tuple[Functions, set[str]]:
    functions: Functions = {}
    others: set[str] = set()
    for name, value in vars(module).items():
        if name.startswith("__") and name != "__version__":
            continue
        if not inspect.isclass(value):
            if callable(value):
                functions[name] = documented_parameters(value)
            else:
                others.add(name)
            continue
        others.add(name)
        for member, attribute in vars(value).items():
            if isinstance(attribute, property):
                others.add(f"{name}.{member}")
            elif (not member.startswith("_") or member in CONTEXT_MANAGER) and callable(attribute):
                functions[f"{name}.{member}"] = documented_parameters(getattr(value, member))
            elif member == "__init__" and str(attribute.__doc__).startswith("__init__(self"):
                functions[f"{name}.__init__"] = documented_parameters(attribute)
    return functions, others


def test_the_stub_names_what_the_module_has() -> None:
    stub_functions, stub_others = read_stub(STUB.read_text())
    functions, others = read_module(_core)
    assert len(functions) > 20
    assert stub_functions == functions
    assert stub_others - {"CoreError.code"} == others


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def cpu_features(", "def processor_features("),
        ("def cancel(self, request_id: int)", "def cancel(self, identifier: int)"),
        ("def kv_dtype(", "def kv_type("),
    ],
)
def test_a_wrong_stub_is_seen(old: str, new: str) -> None:
    source = STUB.read_text()
    assert old in source
    assert read_stub(source.replace(old, new)) != read_stub(source)
    functions, others = read_module(_core)
    wrong_functions, wrong_others = read_stub(source.replace(old, new))
    assert (wrong_functions, wrong_others - {"CoreError.code"}) != (functions, others)
