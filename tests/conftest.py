"""Triton's interpreter where there is no GPU, and fixtures that several test files use."""

import gc
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: threads of their own would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# First, for it sets how threads wait, which OpenMP reads when PyTorch loads.
import hrm  # noqa: F401, I001
import torch

from tests.support import forked
from tests.support.fake_hub import FakeHub

if not torch.cuda.is_available():
    # Read when a kernel is defined, so it is set before `kernels` is imported; `auto` still takes the
    # reference on a CPU.
    os.environ["TRITON_INTERPRET"] = "1"


# A shell that starts the tests with `&` or nohup ignores these signals, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# Folders and files whose tests compile, start processes or run in Triton's interpreter.
SLOW = {"cuda_host", "faults", "fuzz", "kernels"}
SLOW |= {"test_compare", "test_guide_commands", "test_machine_code", "test_memory_estimate", "test_profiling"}
SLOW |= {"test_program", "test_ranks", "test_straight_line", "test_trm", "test_variants"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks slow tests and those that open a browser, for `make test-fast`."""
    for item in items:
        if SLOW & {item.path.stem, item.path.parent.name}:
            item.add_marker("slow")
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


# CPU seconds of each test file, and where the next part of it starts.
spent: defaultdict[str, float] = defaultdict(float)
begin = [0.0]
# A test may replace it in its module.
times = os.times


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", action="store_true", help="list the CPU seconds of each test file")


def cpu_seconds() -> float:
    """CPU seconds of this process and of all that it started and that have ended."""
    return sum(times()[:4]) + forked.cpu_seconds[0]


def pytest_runtest_logstart() -> None:
    begin[0] = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the CPU seconds of this part of the test to its report, which xdist sends to where it is shown."""
    report = yield
    now = cpu_seconds()
    report.user_properties = [("cpu_seconds", now - begin[0])]
    begin[0] = now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for key, seconds in report.user_properties:
        if key == "cpu_seconds" and isinstance(seconds, float):
            spent[report.nodeid.partition("::")[0]] += seconds


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--cpu-seconds"):
        terminalreporter.section(f"CPU seconds: {sum(spent.values()):.0f}")
        for file, seconds in sorted(spent.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{seconds:8.1f} {file}")


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """What earlier tests left in memory is looked through no more: that halves the interpreter's speed."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def float32_on_cpus():
    """`dtype=auto` computes in float32 on every processor, so that results do not depend on the machine."""
    with forked.float32_on_cpus():
        yield


@pytest.fixture(scope="session")
def tiny_sudoku(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 48 training and 20 test puzzles of 4x4 cells."""
    from hrm.data.sudoku.build import builtin_sudoku

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return builtin_sudoku(4, 48, 20, 0, 0)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A Hugging Face hub without a network, in place of its package."""
    hub = FakeHub(tmp_path / "hub")
    for name, module in hub.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return hub
