"""The documents are right: their numbers are the results', their keys, commands and files exist.

The commands of docs/migrating.md are run in tests/test_guide_commands.py.
"""

import re

import pytest

from bench import report
from hrm.analyse import KEYS as ANALYSE_KEYS
from hrm.config import foreign
from hrm.config.load import KEYS
from hrm.evaluate import KEYS as EVALUATE_KEYS
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_measured_tables_are_those_of_the_results():
    assert report.with_measured(README, report.summary()) == README
    results = report.DOCUMENT.read_text(encoding="utf-8")
    assert report.with_measured(results, report.table()) == results


def test_the_tree_lists_existing_folders():
    tree = README.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"\b[a-z_]+\.py\b", tree):
        assert any((ROOT / folder / name).is_file() for folder in ("", "hrm", "tests/support")), name
    for folder in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.name for path in DOCUMENTS]


def test_the_readme_can_be_read_in_minutes():
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_keys_that_documents_name_exist(path):
    for key in re.findall(r"`(?:python train\.py )?([a-z_.]+)=", path.read_text(encoding="utf-8")):
        known = key in KEYS or key in EVALUATE_KEYS or key in ANALYSE_KEYS or foreign.remedy(key, KEYS)
        assert known or key == "arch", key


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_targets_and_files_that_documents_name_exist(path):
    text, makefile = path.read_text(encoding="utf-8"), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w.][\w./-]*)", text, flags=re.MULTILINE):
        assert f"\n{target.replace('.venv', '$(VENV)')}:" in makefile, target
    for file in re.findall(r"`((?:hrm|kernels|bench|tests|docs)/[\w./]+?)/?`", text):
        assert "NAME" in file or (ROOT / file).exists(), file
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), flags=re.MULTILINE) if heading else []
        assert not heading or heading in {h.lower().replace(" ", "-") for h in headings}, link
