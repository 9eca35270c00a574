"""Every package that is asked for or pinned has a line in docs/dependencies.md, and a reason to be there."""

import ast
import importlib.metadata
import re

import pytest
from packaging.requirements import Requirement

from bench import versions
from tests.support.paths import ROOT

COLUMNS = ["package", "purpose", "reason to keep it", "licence", "through"]
# Asked for by extras, and left to who asks.
NOT_PINNED = {"flash-attn", "wandb"}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def asked() -> dict[str, Requirement]:
    """What setup.py asks for, by name."""
    nodes = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"]
    given = {
        word.arg: ast.literal_eval(word.value) for word in calls[0].keywords if "require" in str(word.arg)
    }
    texts = [
        *given["install_requires"],
        *(text for extra in given["extras_require"].values() for text in extra),
    ]
    return {plain(found.name): found for found in map(Requirement, texts)}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs) and len({plain(name) for name, _ in pairs}) == len(pairs)
    return {plain(name): version for name, version in pairs}


def told() -> dict[str, dict[str, str]]:
    """The lines of docs/dependencies.md, by package."""
    rows: dict[str, dict[str, str]] = {}
    for line in (ROOT / "docs" / "dependencies.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells == COLUMNS or set(line) <= set("|-"):
            continue
        row = dict(zip(COLUMNS, cells, strict=True))
        assert plain(row["package"]) not in rows, row["package"]
        rows[plain(row["package"])] = row
    return rows


def test_the_range_of_torch_is_what_the_tests_of_versions_show():
    rows, asks = versions.kept(), asked()
    # Versions may be missing, and a row may be of a part of the tests: it names the files that did not run.
    assert rows
    for row in rows:
        sound = "fault" not in row and row["passed"] > 0 and not row["failed"]
        assert asks["torch"].specifier.contains(row["version"]) == sound, row["version"]
        for name in ("triton", "numpy"):
            assert not sound or asks[name].specifier.contains(row[name]), (row["version"], name)
    # Below the versions that ran nothing is known.
    assert not asks["torch"].specifier.contains("2.9")


def test_every_package_has_a_line_and_no_line_is_left_over():
    assert told().keys() == asked().keys() | pinned().keys()
    for name, row in told().items():
        assert all(row[column] for column in COLUMNS[:4]), name


def test_every_requirement_is_pinned_to_an_allowed_version():
    assert asked().keys() - pinned().keys() == NOT_PINNED
    for name, version in pinned().items():
        assert name not in asked() or asked()[name].specifier.contains(version), name


def test_no_pin_is_without_use():
    rows = told()
    for name, row in rows.items():
        through = plain(row["through"])
        assert through in rows if through else name in asked(), name


@pytest.mark.parametrize("name", sorted(told()))
def test_indirect_dependencies_are_required_by_the_given_package(name):
    through = told()[name]["through"]
    try:
        needs = importlib.metadata.requires(through) if through else None
    # An extra that is not installed here.
    except importlib.metadata.PackageNotFoundError:
        needs = None
    if needs is not None:
        assert name in {plain(Requirement(need).name) for need in needs}


def test_checkpoints_are_read_by_a_torch_that_withstands_them():
    # CVE-2026-24747 was mended in 2.10.0, CVE-2025-32434 in 2.6.0.
    assert not asked()["torch"].specifier.contains("2.9.1")
