"""Imports point one way only, and the planner stays light. Read from the syntax tree: nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# From left to right, as in docs: a part may import what stands to its left. Parts on one line do not know each other.
ORDER = [
    {"planner.errors"},
    {"planner.units", "planner.files"},
    {"planner.model"},
    {"planner.catalog"},
    {"planner.memory"},
    {"planner.fit"},
    {"planner.size", "planner.validate"},
    {"planner.validate_finetune"},
    {"planner.performance"},
    {"planner.validate_training", "planner.validate_throughput"},
    {"planner.cost"},
    {"planner.run"},
    {"planner.plan"},
    {"planner.budget", "planner.compare"},
    {"planner.scale"},
    {"planner.report", "planner.pages", "planner.stack"},
    {"workloads"},
    {"infra"},
    {"planner.preview", "planner.verify", "planner.trace"},
    {"planner.exact", "planner.money", "planner.dataset"},
    {"planner.new", "planner.chat", "planner.manifests"},
    {"planner.cli"},
    {"planner.__main__"},
]
# planner.model and the packages it is split into: one part
SAME_PART = {"planner.architectures": "planner.model"}
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}

# Right of the plan nothing but the plan is known.
NARROW_WAIST = {"planner.errors", "planner.units", "planner.plan", "planner.stack"}

HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "vllm", "triton", "tensorflow", "jax"}
# The two parts that may import something heavy, and only inside a function; a package with all its modules.
ALLOWED_LAZILY = {
    "planner.trace": {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate"},
    "planner.preview": {"pulumi", "pulumi_azure_native", "pulumi_kubernetes"},
}


class Import(NamedTuple):
    target: str
    line: int
    lazy: bool


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of planner, workloads and infra."""
    found = {}
    for package in ("planner", "workloads", "infra"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
each_module = pytest.mark.parametrize("name", sorted(MODULES))


def imports(name: str, source: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of a module, relative ones and importlib.import_module("...") too; lazy: inside a function."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(target, node.lineno, lazy) for target in from_targets(node))
        elif isinstance(node, ast.Call) and called(node.func) in ("import_module", "__import__") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield Import(argument.value, node.lineno, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    def from_targets(node: ast.ImportFrom) -> Iterator[str]:
        base = node.module or ""
        if node.level:
            package = name.split(".") if is_package else name.split(".")[:-1]
            base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
        # `from planner import fit` imports the module planner.fit
        yield from (
            f"{base}.{alias.name}" if base in ("planner", "workloads", "infra") else base for alias in node.names
        )

    def called(function: ast.expr) -> str:
        return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")

    yield from visit(ast.parse(source), lazy=False)


def imports_of(name: str) -> list[Import]:
    path = MODULES[name]
    return list(imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py"))


def part_of(module: str) -> str:
    """`planner.memory.serving` -> `planner.memory`; `infra.pools` -> `infra`."""
    parts = module.split(".")
    part = ".".join(parts[:2]) if parts[0] == "planner" else parts[0]
    return SAME_PART.get(part, part)


def ours(module: str) -> bool:
    return module.split(".")[0] in ("planner", "workloads", "infra")


def wrong_direction(name: str, found: list[Import]) -> list[str]:
    """Imports of `name` that do not point to the left."""
    rank = RANK[part_of(name)]
    return [
        f"{name}:{i.line} imports {i.target}"
        for i in found
        if ours(i.target) and part_of(i.target) != part_of(name) and RANK.get(part_of(i.target), len(ORDER)) >= rank
    ]


def heavy(name: str, found: list[Import]) -> list[str]:
    """Imports of frameworks that `name` may not have."""
    allowed = ALLOWED_LAZILY.get(part_of(name), set())
    bad = []
    for i in found:
        root = i.target.split(".")[0]
        if (root in HEAVY or root.startswith("pulumi")) and not (i.lazy and root in allowed):
            bad.append(f"{name}:{i.line} imports {i.target}" + ("" if i.lazy else " at the top"))
    return bad


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n != "planner"))
def test_every_module_has_its_place_in_the_order(name: str) -> None:
    assert part_of(name) in RANK, f"give {part_of(name)} a place in ORDER"


@each_module
def test_imports_point_only_to_the_left(name: str) -> None:
    if name == "planner":
        assert not [i for i in imports_of(name) if ours(i.target)]
        return
    assert wrong_direction(name, imports_of(name)) == []


def test_workloads_and_infra_know_only_the_plan() -> None:
    for name in (n for n in MODULES if not n.startswith("planner")):
        known = {part_of(i.target) for i in imports_of(name) if i.target.startswith("planner")}
        assert known <= NARROW_WAIST, name


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("planner")))
def test_the_planner_imports_no_framework(name: str) -> None:
    assert heavy(name, imports_of(name)) == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("planner.memory.serving", "from planner.fit import fit", "planner.memory.serving:1 imports planner.fit"),
        ("planner.memory.serving", "from planner import fit", "planner.memory.serving:1 imports planner.fit"),
        ("planner.units", "from . import model", "planner.units:1 imports planner.model"),
        ("planner.report", "import planner.stack", "planner.report:1 imports planner.stack"),
        ("planner.plan", "def f():\n    import infra.pools", "planner.plan:2 imports infra.pools"),
    ],
)
def test_an_import_to_the_right_is_seen(name: str, source: str, expected: str) -> None:
    assert wrong_direction(name, list(imports(name, source))) == [expected]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("planner.fit", "from planner.memory.serving import estimate"),
        ("planner.memory.training", "from planner.memory.estimate import MemoryEstimate"),
        ("planner.memory.training", "from .estimate import MemoryEstimate"),
        ("planner.units", "import re\nfrom pydantic import BaseModel"),
    ],
)
def test_an_import_to_the_left_or_within_a_part_is_allowed(name: str, source: str) -> None:
    assert wrong_direction(name, list(imports(name, source))) == []


@pytest.mark.parametrize(
    ("name", "source", "bad"),
    [
        ("planner.trace", "import torch", True),
        ("planner.trace", "def f():\n    import torch.nn", False),
        ("planner.trace", "def f():\n    import vllm", True),
        ("planner.preview", "def f():\n    import pulumi_azure_native", False),
        ("planner.memory.serving", "def f():\n    from transformers import AutoConfig", True),
        ("planner.model", "import importlib\nimportlib.import_module('torch')", True),
        ("planner.model", "import numpy", False),
    ],
)
def test_a_framework_is_seen_at_the_top_and_in_functions(name: str, source: str, bad: bool) -> None:
    assert bool(heavy(name, list(imports(name, source)))) == bad
