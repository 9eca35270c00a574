"""Imports run one way through the rooms of the project, without a circle."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter

import pytest

from tests.support.paths import ROOT

# From below to above; modules of one line may import each other's rooms.
ROOMS = [
    ["kernels"],
    ["hrm.common"],
    ["hrm.config"],
    ["hrm.data"],
    ["hrm.model", "hrm.distributed"],
    ["hrm.engine"],
    ["hrm.checkpoint"],
    ["hrm.training"],
    ["hrm.evaluation"],
    ["hrm.solving", "hrm.study"],
    ["hrm.analysis"],
    # The commands.
    ["hrm", "train", "kernels.__main__"],
]
# Packages that may be missing, and PyTorch, which takes seconds to load.
OPTIONAL = ("matplotlib", "torch")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("kernels/**/*.py"), *ROOT.glob("hrm/**/*.py"), ROOT / "train.py"]
}


def height(module: str) -> int:
    """The place of a module's room; that of the longest name that begins its own."""
    places = {room: place for place, rooms in enumerate(ROOMS) for room in rooms}
    return places[max((room for room in places if f"{module}.".startswith(f"{room}.")), key=len)]


@cache
def imports(module: str) -> list[tuple[str, bool]]:
    """What a module imports, and whether a function does."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            full = [(f"{node.module}.{alias.name}", id(node) in inner) for alias in node.names]
            found += [(name if name in FILES else str(node.module), within) for name, within in full]
    return found


def is_command(module: str) -> bool:
    return module in FILES and module != "hrm" and height(module) == len(ROOMS) - 1


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    above = [name for name, _ in imports(module) if name in FILES and height(name) > height(module)]
    assert not above, f"{module} imports from rooms above its own"
    within = [name for name, inner in imports(module) if inner and name.partition(".")[0] not in OPTIONAL]
    assert is_command(module) or not within, f"{module} imports inside a function"
    assert not is_command(module) or not [name for name, _ in imports(module) if is_command(name)]


def test_there_are_no_import_cycles():
    graph = {module: {name for name, _ in imports(module) if name in FILES} for module in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_shared_test_code_is_in_support():
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        lines = [line for line in map(ast.unparse, found) if re.search(r"\btests\.([\w.]+\.)?test_", line)]
        assert not lines, f"{path.relative_to(ROOT)}: {lines[0]}: move what is shared to tests/support/"


def test_files_stay_short():
    long = {module: n for module, path in FILES.items() if (n := len(path.read_text().splitlines())) > 400}
    assert not {module: n for module, n in long.items() if not module.startswith("kernels")}
