"""The README says what is so: its numbers are the results', its keys and files exist.

Its table of other guides' commands is run in tests/test_guide_commands.py.
"""

import re
from pathlib import Path

import train
from bench import report
from hrm.config.load import KEYS
from hrm.evaluate import KEYS as JUDGED

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_measured_table_is_that_of_the_results():
    assert report.readme_with(README, report.table()) == README


def test_the_tree_names_what_is_there():
    tree = README.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"\b[a-z_]+\.py\b", tree):
        assert any((ROOT / folder / name).is_file() for folder in ("", "hrm", "tests")), name
    for folder in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_keys_and_targets_that_the_readme_names_exist():
    for key in re.findall(r"`(?:python train\.py )?([a-z_.]+)=", README):
        assert key in KEYS or key in JUDGED or key == "arch", key
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
