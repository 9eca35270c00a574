"""Runs the tests of model, engine, programs, modes and kernels with each version of PyTorch.

`make versions` runs them for one version after the other and writes bench/results/versions.json after
each file; the same command continues after a cut. A result is kept with its commit until a newer one
replaces it. Each version has an environment of its own, which is kept, with the Triton that it requires. The
row of a version that cannot be installed gives the cause.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrm.common.errors import run_command
from hrm.common.files import write_whole
from hrm.common.machine import processor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "versions.json"
VERSIONS = ("2.10", "2.11", "2.12", "2.13", "2.14")
TESTS = (
    "tests/model/test_model.py",
    "tests/model/test_act.py",
    "tests/engine/test_engine.py",
    "tests/engine/test_program.py",
    "tests/engine/test_modes.py",
    "tests/kernels",
)
# The code that these tests run. A commit that changes none of it leaves every result current.
SOURCES = (
    *("hrm", "kernels", "train.py", "bench/implementations.py", "pyproject.toml"),
    *("tests/conftest.py", "tests/support", *TESTS),
)
# Triton 3.6's interpreter fails with numpy 2.4 in loops whose bounds are known at run time only.
NUMPY = {"2.10": "numpy<2.4", "2.11": "numpy<2.4"}
# Dependencies of the tests besides PyTorch, which installs its Triton.
PACKAGES = (
    *("numba", "omegaconf", "pydantic", "PyYAML", "safetensors", "scipy", "tqdm"),
    *("pytest", "hypothesis", "matplotlib", "nvtx"),
)
OUTCOMES = ("passed", "failed", "skipped")


def python_of(version: str, folder: Path) -> Path:
    """The Python of a version's environment, which is created if missing.

    Raises RuntimeError with pip's last line if something cannot be installed.
    """
    home = folder / f"torch-{version}"
    python = home / "bin" / "python"
    finished = home / ".versions"
    if not finished.exists():
        numpy = NUMPY.get(version, "numpy")
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        if not python.exists():
            _run([sys.executable, "-m", "venv", str(home)])
        _run([*pip, f"torch=={version}.*", numpy, *PACKAGES])
        finished.touch()
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])


def installed(python: Path) -> dict[str, str]:
    """The versions in an environment, for its row."""
    code = (
        "import json, platform, numpy, torch, triton; print(json.dumps({'torch': torch.__version__, "
        "'triton': triton.__version__, 'numpy': numpy.__version__, 'python': platform.python_version()}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def counts(report: Path) -> dict[str, Any]:
    """Tests by outcome, and the names of those that failed, in a report in JUnit's format.

    A test whose preparation fails is a failure.
    """
    result: dict[str, Any] = {**dict.fromkeys(OUTCOMES, 0), "failures": []}
    # pytest has just written this file.
    for case in ElementTree.parse(report).getroot().iter("testcase"):  # noqa: S314
        found = {child.tag for child in case}
        if found & {"failure", "error"}:
            result["failed"] += 1
            result["failures"].append(case.get("name"))
        else:
            result["skipped" if "skipped" in found else "passed"] += 1
    return result


def suite() -> list[str]:
    """TESTS with the files of each folder, relative to ROOT."""
    paths = [ROOT / name for name in TESTS]
    files = [file for path in paths for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]
    return [os.path.relpath(file, ROOT) for file in files]


def result_under(python: Path, file: str, minutes: float) -> dict[str, Any]:
    """Outcomes of a test file under an environment's Python, or the error that prevented them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor")}
        start = time.perf_counter()
        try:
            subprocess.run(
                [str(python), "-m", "pytest", *options, file], cwd=ROOT, env=environment, timeout=60 * minutes
            )
        except subprocess.TimeoutExpired:
            return {"fault": f"the file did not end within {minutes:g} minutes"}
        if not report.exists():
            return {"fault": "pytest wrote no report"}
        return {**counts(report), "seconds": round(time.perf_counter() - start)}


def conditions() -> dict[str, Any]:
    """The machine, and the last commit of the sources. changed: whether the sources differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    commit = git("log", "-1", "--format=%H", "--", *SOURCES)
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    return {"processor": processor(), "commit": commit, "changed": bool(changed)}


def totals(files: dict[str, dict[str, Any]], commit: str) -> dict[str, Any]:
    """The sums over a row's results of a commit, the files without one, and the results of any commit."""
    now = {file: found for file, found in files.items() if found["commit"] == commit}
    sums = {name: sum(found.get(name, 0) for found in now.values()) for name in (*OUTCOMES, "seconds")}
    return {**sums, "to_run": [file for file in suite() if file not in now], "files": files}


def row(version: str, folder: Path, minutes: float, only: Sequence[str] = ()) -> dict[str, Any]:
    """Runs one version and stores its row after each file. only: prefixes of file names, () for all.

    Files with a result of the same commit, without changes, are not run again. Results of another commit stay
    until then, those of another processor or of other packages do not.
    """
    common = {"version": version, **conditions()}
    try:
        python = python_of(version, folder)
    except RuntimeError as error:
        found = {**common, "fault": str(error)}
        keep(found)
        return found
    packages, commit, changed = installed(python), common["commit"], common["changed"]
    common |= packages
    old = next((each for each in kept() if each["version"] == version), {})
    same = all(old.get(name) == common[name] for name in ("processor", *packages))
    files = {file: old["files"][file] for file in suite() if same and file in old.get("files", {})}
    for file in suite():
        found = files.get(file, {"fault": "never ran"})
        whole = "fault" not in found and found["commit"] == commit and not (changed or found["changed"])
        if file.startswith(tuple(only) or "") and not whole:
            files[file] = {**result_under(python, file, minutes), "commit": commit, "changed": changed}
        keep({**common, **totals(files, commit)})
    return {**common, **totals(files, commit)}


def kept() -> list[dict[str, Any]]:
    """The rows of RESULTS."""
    return json.loads(RESULTS.read_text())["versions"] if RESULTS.exists() else []


def keep(new: dict[str, Any]) -> None:
    """Adds a row to RESULTS; it replaces the row of the same version."""
    by_version = {each["version"]: each for each in [*kept(), new]}
    document = {
        "what": "tests by version of PyTorch, on a CPU, kernels in Triton's interpreter",
        "command": "make versions",
        "versions": [by_version[version] for version in VERSIONS if version in by_version],
    }
    write_whole(RESULTS, json.dumps(document, indent=1) + "\n")


def faults(found: dict[str, Any]) -> list[str]:
    """Reasons why a row does not prove that its version is supported; [] if it does."""
    if "fault" in found:
        return [found["fault"]]
    ran = {file: each for file, each in found["files"].items() if file not in found["to_run"]}
    lines = [f"{file}: {each['fault']}" for file, each in ran.items() if "fault" in each]
    lines += [f"{file}::{name}" for file, each in ran.items() for name in each.get("failures", [])]
    return lines + [f"{file} did not run on commit {found['commit'][:7]}" for file in found["to_run"]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.versions", description=__doc__.split("\n\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"default {' '.join(VERSIONS)}")
    parser.add_argument(
        "--environments",
        type=Path,
        default=ROOT / ".venv-versions",
        help="folder of the persistent environments; default %(default)s",
    )
    parser.add_argument(
        "--minutes", type=float, default=30, help="time limit per test file; default %(default)s"
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="FILE", help="files, or prefixes of file names"
    )
    options = parser.parse_args(argv)
    wanted = options.versions or VERSIONS
    if unknown := sorted(set(wanted) - set(VERSIONS)):
        parser.error(f"unknown version {unknown[0]!r}: choose from {', '.join(VERSIONS)}")
    failed = False
    for version in wanted:
        found = row(version, options.environments, options.minutes, options.only)
        counted = ", ".join(f"{found[name]} {name}" for name in OUTCOMES if name in found)
        print(f"torch {found.get('torch', version)}: {counted or 'nothing ran'}", flush=True)
        for line in faults(found):
            print(f"    {line}", flush=True)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(run_command(main, "the finished test files are saved; the same command continues"))
