"""Imports go down only: each package may use its own floor and those below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    ("autossl.version", "autossl.data", "autossl.planners.plans"),
    ("autossl.networks", "autossl.preprocessing"),
    ("autossl.planners",),
    ("autossl.inference", "autossl.evaluation"),
    ("autossl.trainers",),
    ("autossl.evaluation.benchmark",),
    ("autossl.interop", "autossl.demo"),
    ("autossl.pipeline",),
    ("autossl.cli",),
)
"""Lowest first. What compares runs of trainers is a floor of its own above them."""
FOLDERS = {
    "autossl": ROOT / "autossl",
    "autossl.planners": ROOT / "planners",
    "autossl.preprocessing": ROOT / "preprocessing",
    "autossl.trainers": ROOT / "trainers",
    "autossl.evaluation": ROOT / "evaluation",
}


def floor_of(module: str) -> int | None:
    """The floor of the longest name that the module lies under."""
    names = [(len(name), floor) for floor, names in enumerate(FLOORS) for name in names if _under(module, name)]
    return max(names)[1] if names else None


def _under(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def modules() -> dict[str, Path]:
    """Importable name → file, of the whole package."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            if "__pycache__" not in path.parts and path.name != "__init__.py":
                found[".".join((package, *path.relative_to(folder).with_suffix("").parts))] = path
    return found


def imported(path: Path) -> set[str]:
    """Our modules that a file imports when it runs, wherever the import stands; not those for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & set(modules())


def test_every_module_has_a_floor() -> None:
    assert [name for name in modules() if floor_of(name) is None] == []


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name: str) -> None:
    own = floor_of(name)
    assert own is not None
    upward = [other for other in imported(modules()[name]) if (floor_of(other) or 0) > own]
    assert upward == [], f"{name} imports from a higher floor"


def test_inference_never_imports_a_training_method() -> None:
    reached, todo = set(), {name for name in modules() if _under(name, "autossl.inference")}
    while todo:
        reached |= todo
        todo = {other for name in todo for other in imported(modules()[name])} - reached
    assert not [name for name in reached if _under(name, "autossl.trainers")]
