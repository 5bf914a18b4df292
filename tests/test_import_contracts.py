"""Which modules may import which: the walls between the folders of models/ and service/.

Imports are read from the source. What stands under `if TYPE_CHECKING:` is no import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.environment import ROOT

WITHOUT_TORCH = ("models.errors", "models.formats", "service.api", "service.engine", "service.requests")
TORCH = ("torch", "transformers", "diffusers", "safetensors.torch", "triton")  # each of these loads torch
CLOCKS = ("time", "threading", "asyncio")  # time passes in the engine only by the clock that it is given
FORBIDDEN = {  # package: what it does not import, inside a function either
    "models": ("service", "fastapi"),
    "models.formats": ("models.checkpoint", "models.networks"),
    "models.networks": ("models.formats", "models.checkpoint"),
    "service.settings": ("service.engine", "service.worker", "service.device"),
    "service.engine": ("service.api", "service.device", "service.requests", "service.worker", *CLOCKS),
    "service.requests": ("service.api", "service.device"),
    "service.api": ("service.device", "models.training"),
    "service.device": ("service.api", "models.training"),
    "service.worker": ("service.api", "models.training"),
}


@cache
def modules() -> dict[str, Path]:
    """Module name -> file, of models/ and service/."""
    files = [file for folder in ("models", "service") for file in sorted((ROOT / folder).rglob("*.py"))]
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)
    return {name.removesuffix(".__init__"): file for name, file in zip(names, files, strict=True)}


@cache
def imports(name: str, lazy: bool) -> frozenset[str]:
    """What a module imports; lazy: inside functions too."""
    return frozenset(targets_in(ast.parse(modules()[name].read_text()), lazy))


def targets_in(node: ast.AST, lazy: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module is not None, "imports are absolute"
            parts = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (part if part in modules() else child.module for part in parts)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from targets_in(ast.Module(child.orelse, []), lazy)
        elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from targets_in(child, lazy)


def loaded_with(name: str) -> Iterator[str]:
    """The modules that the import of this one names, their packages included."""
    for target in (name, *imports(name, lazy=False)):
        parts = target.split(".")
        yield from (".".join(parts[: count + 1]) for count in range(len(parts)))


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def chain(name: str, goals: tuple[str, ...], seen: set[str]) -> list[str]:
    """Modules by whose imports one of the goals is loaded with this module; empty where none is."""
    seen.add(name)
    for target in sorted(loaded_with(name)):
        if target in goals:
            return [name, target]
        if target in modules() and target not in seen and (rest := chain(target, goals, seen)):
            return [name, *rest]
    return []


def loading(names: Iterable[str], goals: tuple[str, ...]) -> set[str]:
    return {" -> ".join(found) for name in names if (found := chain(name, goals, set()))}


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_torch_is_not_loaded_by(package):
    names = [name for name in modules() if is_below(name, package)]
    assert names
    assert not loading(names, TORCH)
    assert not {name for name in names if imports(name, lazy=True) & {*TORCH}}


def test_triton_is_loaded_only_where_a_function_asks_for_it():
    assert not loading(modules().keys() - {"models.networks.triton_kernels"}, ("triton",))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_nothing_forbidden_is_imported_by(package):
    names = [name for name in modules() if is_below(name, package)]
    broken = {
        f"{name} imports {target}"
        for name in names
        for target in imports(name, lazy=True)
        if any(is_below(target, forbidden) for forbidden in FORBIDDEN[package])
    }
    assert names
    assert not broken


def test_no_modules_import_each_other_in_a_circle():
    left = {name: imports(name, lazy=True) & modules().keys() - {name} for name in modules()}
    while leaves := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in leaves}
    assert not circle(left)


def circle(graph: dict[str, frozenset[str]]) -> list[str]:
    """One circle of a graph in which every module leads to another; empty if the graph is."""
    path = [min(graph)] if graph else []
    while path and path[-1] not in path[:-1]:
        path.append(min(graph[path[-1]] & graph.keys()))
    return path[path.index(path[-1]) :] if path else []
