"""Timing on a machine that others use: what counts as idle, and the ratios of a measurement."""

import pytest

from bench import beside
from bench.beside import Beside
from bench.test_shared_machine import NotIdle, check_idle, ratios


def test_other_processes_are_counted_and_own_children_are_not(monkeypatch, tmp_path):
    # user, nice, system, idle, iowait, irq, softirq, steal, guest in ticks; a guest's time is user time too.
    stat = tmp_path / "stat"
    monkeypatch.setattr(beside, "STAT", stat)
    ticks = beside.os.sysconf("SC_CLK_TCK")
    clock = iter((100.0, 110.0))
    monkeypatch.setattr(beside.time, "perf_counter", lambda: next(clock))
    times = iter([(1.0, 0.0, 0.0, 0.0, 0.0), (4.0, 0.5, 1.0, 0.5, 0.0)])
    monkeypatch.setattr(beside.os, "times", lambda: next(times))
    stat.write_text("cpu  100 0 0 5000 0 0 0 0 0 0\n")
    with Beside() as found:
        stat.write_text(f"cpu  {100 + 8 * ticks} {ticks} {ticks} 9000 70 {ticks} 0 {4 * ticks} 900 0\n")
    # 15 seconds of all CPUs, 5 of this process and its children, in 10 seconds.
    assert found.seconds == 10 and found.others == pytest.approx(1.0)


def test_a_busy_machine_is_not_measured(monkeypatch, tmp_path):
    check_idle(0.1)
    with pytest.raises(NotIdle, match=r"others use 0\.40 of its CPUs"):
        check_idle(0.4)
    monkeypatch.setattr(beside, "STAT", tmp_path / "none")
    with Beside() as found:
        pass
    assert found.others is None
    with pytest.raises(NotIdle, match="an unknown number"):
        check_idle(found.others)


def test_ratios_are_relative_to_the_fastest_setting():
    seconds = {"a": {0: [0.2, 0.1, 0.12], 1: [0.24, 9, 0.2]}, "b": {0: [0.1, 0.1, 3], 1: [0.5, 0.5, 0.5]}}
    assert ratios(seconds) == {"a": {0: 1.2, 1: 2.4}, "b": {0: 1.0, 1: 5.0}}
