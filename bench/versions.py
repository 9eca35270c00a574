"""The tests of model, engine, programs, modes and kernels under each version of PyTorch.

`make versions` runs them for one version after the other and writes bench/results/versions.json. Each version
has an environment of its own, which is kept, with the Triton that it asks for. The row of a version that
cannot be installed gives the cause.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from hrm.common.errors import run_command
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
# Triton 3.6's interpreter fails with numpy 2.4 in loops whose bounds are known at run time only.
NUMPY = {"2.10": "numpy<2.4", "2.11": "numpy<2.4"}
# What the tests need besides PyTorch, which brings its Triton.
PACKAGES = (
    *("numba", "omegaconf", "PyYAML", "safetensors", "tqdm", "nvtx", "einops", "pydantic"),
    *("pytest", "hypothesis", "matplotlib"),
)
OUTCOMES = ("passed", "failed", "skipped")


def python_of(version: str, folder: Path) -> Path:
    """The Python of a version's environment, which is made if it is not there.

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
    """The versions that a row names, as the environment has them."""
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
    # The file that pytest wrote a moment ago.
    for case in ElementTree.parse(report).getroot().iter("testcase"):  # noqa: S314
        found = {child.tag for child in case}
        if found & {"failure", "error"}:
            result["failed"] += 1
            result["failures"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            result["skipped" if "skipped" in found else "passed"] += 1
    return result


def results_under(python: Path, minutes: float) -> dict[str, Any]:
    """What the tests say under an environment's Python."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            str(python),
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *TESTS,
        ]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor")}
        start = time.perf_counter()
        try:
            subprocess.run(command, cwd=ROOT, env=environment, timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            return {"fault": f"the tests did not end within {minutes:g} minutes"}
        if not report.exists():
            return {"fault": "pytest wrote no report"}
        return {**counts(report), "seconds": round(time.perf_counter() - start)}


def row(version: str, folder: Path, minutes: float) -> dict[str, Any]:
    """One version's row of the results."""
    commit = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    common = {
        "version": version,
        "processor": processor(),
        "commit": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
    }
    try:
        python = python_of(version, folder)
    except RuntimeError as error:
        return {**common, "fault": str(error)}
    return {**common, **installed(python), **results_under(python, minutes)}


def keep(rows: list[dict[str, Any]]) -> None:
    """Puts rows into RESULTS in place of those of the same versions."""
    old = json.loads(RESULTS.read_text())["versions"] if RESULTS.exists() else []
    by_version = {each["version"]: each for each in [*old, *rows]}
    document = {
        "what": "tests by version of PyTorch, on a CPU, kernels in Triton's interpreter",
        "command": "make versions",
        "tests": TESTS,
        "versions": [by_version[version] for version in VERSIONS if version in by_version],
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.versions", description=__doc__.split("\n\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"default {' '.join(VERSIONS)}")
    parser.add_argument(
        "--environments",
        type=Path,
        default=ROOT / ".venv-versions",
        help="folder of the environments, which are kept; default %(default)s",
    )
    parser.add_argument("--minutes", type=float, default=30, help="limit of a version; default %(default)s")
    options = parser.parse_args(argv)
    wanted = options.versions or VERSIONS
    if unknown := sorted(set(wanted) - set(VERSIONS)):
        parser.error(f"unknown version {unknown[0]!r}: choose from {', '.join(VERSIONS)}")
    failed = False
    for version in wanted:
        found = row(version, options.environments, options.minutes)
        keep([found])
        outcome = ", ".join(f"{found[name]} {name}" for name in OUTCOMES if name in found)
        print(f"torch {found.get('torch', version)}: {found.get('fault') or outcome}", flush=True)
        failed |= "fault" in found or found["failed"] > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(run_command(main, "what was printed is all there is"))
