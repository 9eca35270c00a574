"""Results of `make versions`: counted and stored."""

import sys
from pathlib import Path

import pytest

from bench import versions
from bench.versions import counts, faults, keep, main, python_of, result_under, row

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
        "failures": ["test_two", "test_three"],
    }


def test_a_file_runs_under_the_given_python(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_a():\n    pass\n\n\ndef test_b():\n    assert 0\n")
    found = result_under(Path(sys.executable), str(tmp_path / "test_some.py"), minutes=5)
    assert found.pop("seconds") < 300
    assert found == {"passed": 1, "failed": 1, "skipped": 0, "failures": ["test_b"]}
    assert result_under(Path(sys.executable), str(tmp_path / "test_some.py"), minutes=0) == {
        "fault": "the file did not end within 0 minutes"
    }


def test_a_cut_costs_one_file(monkeypatch, tmp_path):
    """Files that have a result of this commit run no more; one that failed to end does."""
    asked: list[str] = []
    ends = {"tests/b.py": {"fault": "slow"}, "tests/c.py": None}
    now = {"processor": "p", "commit": "a", "changed": False}

    def result(python, file, minutes):
        asked.append(file)
        if (end := ends.get(file, {"passed": 1, "failed": 0, "skipped": 2, "seconds": 3})) is None:
            raise KeyboardInterrupt
        return end

    monkeypatch.setattr(versions, "RESULTS", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "TESTS", ("tests/a.py", "tests/b.py", "tests/c.py"))
    monkeypatch.setattr(versions, "python_of", lambda version, folder: Path("python"))
    monkeypatch.setattr(versions, "installed", lambda python: {"torch": "2.11.0"})
    monkeypatch.setattr(versions, "result_under", result)
    monkeypatch.setattr(versions, "conditions", lambda: now)
    with pytest.raises(KeyboardInterrupt):
        row("2.11", tmp_path, 1)
    (cut,) = versions.kept()
    assert faults(cut) == ["tests/b.py: slow", "tests/c.py did not run on commit a"]
    ends.clear()
    asked.clear()
    whole = row("2.11", tmp_path, 1)
    assert asked == ["tests/b.py", "tests/c.py"] and versions.kept() == [whole] and not faults(whole)
    assert (whole["passed"], whole["skipped"], whole["seconds"]) == (3, 6, 9)
    asked.clear()
    now["commit"] = "b"
    newer = row("2.11", tmp_path, 1, ["tests/b"])
    assert asked == ["tests/b.py"] and newer["passed"] == 1
    assert faults(newer) == [f"tests/{name}.py did not run on commit b" for name in "ac"]
    assert [each["commit"] for each in newer["files"].values()] == ["a", "b", "a"]
    asked.clear()
    now["changed"] = True
    row("2.11", tmp_path, 1, ["tests/b"])
    now["changed"] = False
    assert not faults(row("2.11", tmp_path, 1)) and asked == ["tests/b.py", *versions.TESTS]


def test_rows_replace_those_of_their_version_in_the_order_of_versions(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "RESULTS", tmp_path / "versions.json")
    for each in ("2.13", 1), ("2.10", None), ("2.13", 2), ("2.11", 3):
        keep(dict(zip(("version", "passed"), each, strict=True)))
    assert [(each["version"], each["passed"]) for each in versions.kept()] == [
        ("2.10", None),
        ("2.11", 3),
        ("2.13", 2),
    ]


def test_an_environment_that_cannot_be_made_is_a_row_with_its_cause(monkeypatch, tmp_path):
    def refused(command):
        raise RuntimeError("ERROR: No matching distribution found for torch==2.10.*")

    monkeypatch.setattr(versions, "RESULTS", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "_run", refused)
    assert main(["--environments", str(tmp_path), "2.10"]) == 1
    (found,) = versions.kept()
    assert faults(found) == ["ERROR: No matching distribution found for torch==2.10.*"]


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
