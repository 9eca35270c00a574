"""How `make versions` counts and keeps results."""

import json
import sys
from pathlib import Path

import pytest

from bench import versions
from bench.versions import counts, keep, main, python_of, results_under

REPORT = """<testsuites><testsuite>
<testcase classname="tests.model.test_act" name="test_one"/>
<testcase classname="tests.model.test_act" name="test_two"><failure message="no">E</failure></testcase>
<testcase classname="tests.model.test_act" name="test_three"><error message="no">E</error></testcase>
<testcase classname="tests.model.test_act" name="test_four"><skipped message="no GPU"/></testcase>
<testcase classname="tests.model.test_act" name="test_five"><system-out>text</system-out></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted_by_outcome(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert counts(tmp_path / "report.xml") == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "failures": ["tests.model.test_act::test_two", "tests.model.test_act::test_three"],
    }


def test_tests_run_under_the_given_python(monkeypatch, tmp_path):
    (tmp_path / "test_some.py").write_text("def test_a():\n    pass\n\n\ndef test_b():\n    assert 0\n")
    monkeypatch.setattr(versions, "TESTS", (str(tmp_path / "test_some.py"),))
    found = results_under(Path(sys.executable), minutes=5)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 0)
    assert found["failures"][0].endswith("test_some::test_b") and "fault" not in found
    assert results_under(Path(sys.executable), minutes=0) == {
        "fault": "the tests did not end within 0 minutes"
    }


def test_rows_replace_those_of_their_version_in_the_order_of_versions(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "RESULTS", tmp_path / "versions.json")
    keep([{"version": "2.13", "passed": 1}, {"version": "2.10", "fault": "no"}])
    keep([{"version": "2.13", "passed": 2}, {"version": "2.11", "passed": 3}])
    kept = json.loads((tmp_path / "versions.json").read_text())["versions"]
    assert [(row["version"], row.get("passed")) for row in kept] == [("2.10", None), ("2.11", 3), ("2.13", 2)]


def test_an_environment_that_cannot_be_made_is_a_row_with_its_cause(monkeypatch, tmp_path):
    def refused(command):
        raise RuntimeError("ERROR: No matching distribution found for torch==2.10.*")

    monkeypatch.setattr(versions, "RESULTS", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "_run", refused)
    assert main(["--environments", str(tmp_path), "2.10"]) == 1
    (row,) = json.loads((tmp_path / "versions.json").read_text())["versions"]
    assert row["fault"] == "ERROR: No matching distribution found for torch==2.10.*" and "passed" not in row


def test_an_environment_is_made_once(monkeypatch, tmp_path):
    commands: list[list[str]] = []
    monkeypatch.setattr(versions, "_run", commands.append)
    (tmp_path / "torch-2.11").mkdir()
    for _ in range(2):
        assert python_of("2.11", tmp_path) == tmp_path / "torch-2.11" / "bin" / "python"
    made, filled = commands
    assert made[1:3] == ["-m", "venv"] and {"torch==2.11.*", "numpy<2.4"} < set(filled)


def test_an_unknown_version_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["2.9"])
    assert "unknown version '2.9': choose from 2.10, 2.11" in capsys.readouterr().err
