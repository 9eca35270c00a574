"""The threads of a process follow its affinity, the cgroup's quota, the ranks and the user."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hrm.common import threads
from hrm.common.threads import THREADS_HELP, configure, threads_note, threads_of_each, usable_cpus
from tests.support.paths import ROOT


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A root folder with /proc and /sys as given, on a machine of 64 CPUs."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(threads, "_configured", [""])

    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "3:cpuset:/x\n2:cpu,cpuacct:/docker/1\n"}
CASES = {
    "no cgroups": ({}, 64),
    "v2, no quota": ({**V2, "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 64),
    "v2, 2 CPUs": ({**V2, "sys/fs/cgroup/a/b/cpu.max": "200000 100000\n"}, 2),
    "v2, 1.5 CPUs": ({**V2, "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 2),
    "v2, the parent's is less": (
        {**V2, "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"},
        3,
    ),
    "v2 in a container": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    "v2, more than there are": ({**V2, "sys/fs/cgroup/a/b/cpu.max": "9900000 100000\n"}, 64),
    "v1, none": ({**V1, "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "-1\n"}, 64),
    "v1": (
        {
            **V1,
            "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
        },
        1,
    ),
    "v1 in a container": (
        {
            **V1,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "damaged": ({**V2, "sys/fs/cgroup/a/b/cpu.max": "many\n"}, 64),
}


@pytest.mark.parametrize("name", CASES)
def test_usable_cpus_follow_the_quota(machine, name):
    files, expected = CASES[name]
    assert usable_cpus(machine(files)) == expected


def test_usable_cpus_follow_the_affinity(machine, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5})
    assert usable_cpus(machine({})) == 2


def configured(root: Path, **environ: str) -> dict[str, str]:
    configure(environ, root)
    return environ


def test_threads_sleep_at_a_barrier_unless_the_user_chose(machine):
    assert configured(machine({})) == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert configured(machine({}), OMP_WAIT_POLICY="ACTIVE") == {"OMP_WAIT_POLICY": "ACTIVE"}


def test_a_quota_sets_the_threads_unless_the_user_chose(machine):
    root = machine(CASES["v2, 2 CPUs"][0])
    assert configured(root)["OMP_NUM_THREADS"] == "2"
    assert configured(root)["TORCHINDUCTOR_COMPILE_THREADS"] == "2"
    assert configured(root, OMP_NUM_THREADS="5")["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("launcher", "given", "expected"),
    [
        (b"PATH=/bin\0", "1", "16"),
        (b"PATH=/bin\0OMP_NUM_THREADS=1\0", "1", "1"),
        (b"PATH=/bin\0OMP_NUM_THREADS=3\0", "3", "3"),
    ],
)
def test_ranks_share_a_machine_unless_the_user_chose(machine, launcher, given, expected):
    root = machine({})
    (root / f"proc/{os.getppid()}").mkdir(parents=True)
    (root / f"proc/{os.getppid()}/environ").write_bytes(launcher)
    found = configured(root, LOCAL_WORLD_SIZE="4", OMP_NUM_THREADS=given)
    assert found["OMP_NUM_THREADS"] == expected


def test_a_launcher_that_cannot_be_read_keeps_its_threads(machine):
    assert configured(machine({}), LOCAL_WORLD_SIZE="4", OMP_NUM_THREADS="1")["OMP_NUM_THREADS"] == "1"


def test_processes_share_the_cpus(machine, monkeypatch):
    monkeypatch.setattr(threads, "usable_cpus", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_of_each(1) == {} and threads_of_each(3) == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads_of_each(3) == {}
    # A value that `configure` set is no choice of the user.
    monkeypatch.setattr(threads, "_configured", ["4"])
    assert threads_of_each(16) == {"OMP_NUM_THREADS": "1"}


def test_the_note_gives_the_limit(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 2)
    assert threads_note(2) == "2 threads (2 of 64 CPUs may be used)"
    monkeypatch.setattr(threads, "usable_cpus", lambda: 64)
    assert threads_note(1) == "1 thread"


def test_every_entry_sets_the_policy_before_pytorch_loads():
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    code = "import os, sys, hrm; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "PASSIVE\n", done.stderr


@pytest.mark.parametrize("command", ["train", "hrm.evaluate", "hrm.solve", "hrm.compare", "hrm.sweep"])
def test_the_help_of_each_command_that_computes_tells_of_threads(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(command).main(["--help"])
    assert THREADS_HELP in capsys.readouterr().out
