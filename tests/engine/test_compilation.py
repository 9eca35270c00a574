"""What surrounds the compiler: the line before it, its time, and processes that a stop leaves behind."""

import subprocess
import sys
import time

import pytest

from hrm.common.errors import Stopped
from hrm.engine import compilation as module
from hrm.engine import engine as engine_module
from hrm.engine.compilation import TIMES, Compilation
from hrm.engine.modes import COMPILE
from hrm.training.signals import INTERRUPT
from tests.support.engines import assert_same_state, batches, make_config, make_engine


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The compiler's cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def lines_of(*shapes: int, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    for shape in shapes:
        with Compilation(said.append).of("a step", shape):
            clock[0] += 7
    return said


def test_the_time_of_the_last_compilation_of_the_same_shape_is_announced(folder, monkeypatch):
    unknown = "compiling a step (about a minute on two slow cores, once)"
    known = "compiling a step (took 7 s last time)"
    assert lines_of(1, 2, 1, clock=[0.0], monkeypatch=monkeypatch) == [unknown, unknown, known]
    for damage in ("", "[]", '{"a": "b"}', "\x00"):
        (folder / TIMES).write_text(damage)
        assert lines_of(1, clock=[0.0], monkeypatch=monkeypatch) == [unknown]
    monkeypatch.setattr(module, "MOST_TIMES", 1)
    assert lines_of(1, 2, 1, clock=[0.0], monkeypatch=monkeypatch) == [known, unknown, unknown]


def test_a_stopped_compilation_records_no_time(folder):
    with pytest.raises(Stopped), Compilation().of("a step"):
        raise Stopped(INTERRUPT)
    assert not (folder / TIMES).exists()


# A process with a child of its own, as a compiler's driver has.
DRIVER = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"


def driver() -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=-1, stdout=-1)
    assert process.stdout is not None
    # The child is there.
    process.stdout.readline()
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")
@pytest.mark.parametrize("error", [Stopped(INTERRUPT), KeyboardInterrupt(), ValueError("a fault")])
def test_a_stop_ends_only_compiler_processes(error, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.0)
    with driver() as earlier:
        started = []
        with pytest.raises(type(error)), Compilation().interruptible():
            started.append(driver())
            raise error
        with started[0] as later:
            ends = not isinstance(error, ValueError)
            if ends:
                assert later.wait(60) == -9
                # The end of the child, which held the pipe.
                assert later.stdout.read() == b""
            assert (later.poll() is None) == (not ends) and earlier.poll() is None
            later.kill() if ends else later.communicate(b"\n")
        earlier.communicate(b"\n")
        assert earlier.returncode == 0


def test_a_failure_waits_for_the_signal_that_caused_it(monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(ValueError), Compilation().interruptible():
        raise ValueError
    assert waited == [module.GRACE]


def test_a_stop_during_measurement_chooses_no_mode(monkeypatch):
    found = [Stopped(INTERRUPT), None]

    def measure(function, whole, run, steps, device, compiling):
        if (stop := found.pop(0)) is not None:
            raise stop
        return COMPILE

    monkeypatch.setattr(engine_module, "faster_mode", measure)
    engine = make_engine(make_config(mode="auto"))
    with pytest.raises(Stopped) as stopped:
        engine.training_state()
    assert stopped.value.code == INTERRUPT
    assert engine.mode == COMPILE and not found


def test_a_stop_while_the_step_compiles_changes_no_state(monkeypatch):
    engine, untouched = make_engine(), make_engine()
    batch = next(batches())
    monkeypatch.setattr(engine, "_mode", COMPILE)

    def interrupted(*_):
        raise Stopped(INTERRUPT)

    with monkeypatch.context() as patch:
        patch.setattr(engine.program, "compiled", interrupted)
        with pytest.raises(Stopped):
            engine.train_step(batch)
        with pytest.raises(Stopped):
            engine.prepare()
    monkeypatch.setattr(engine, "_mode", untouched.mode)
    assert engine.step == 0
    for each in (engine, untouched):
        each.train_step(batch)
    assert_same_state(engine, untouched)
