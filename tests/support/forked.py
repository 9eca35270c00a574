"""Python programs that start in milliseconds, forked from a process that has imported the trainer.

A new Python process spends 4 seconds on imports. Forked processes share a hash seed, so each kind of test
also has a case with a new process. `python -m tests.support.forked FD` is the process that forks.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from tests.support.paths import ROOT

PRELOADED = ["torch.distributed.run", "hrm.evaluate", "hrm.compare", "hrm.engine.engine"]
PRELOADED += [f"hrm.training.{path.stem}" for path in sorted((ROOT / "hrm/training").glob("[a-z]*.py"))]
TORCHRUN = ["-m", "torch.distributed.run"]
# Libraries read variables with these prefixes while they load.
READ_AT_LOAD = ("CUDA_", "HRM_KERNELS", "KMP_", "LD_", "MKL_", "OMP_", "PYTHONHASHSEED", "TORCH", "TRITON_")
Stream = int | IO[Any] | None
# CPU seconds of the forked programs that have ended.
cpu_seconds = [0.0]


class Forked:
    """A forked program, with the part of Popen's interface that tests use."""

    def __init__(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        start_new_session: bool = False,
    ) -> None:
        self.returncode: int | None = None
        self._status, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        streams = [
            number if stream is None else stream for number, stream in enumerate((stdin, stdout, stderr))
        ]
        files = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
        message = json.dumps([list(words), dict(env), start_new_session]).encode()
        with theirs:
            socket.send_fds(_server()[0], [message], [*files, theirs.fileno()])
        self.pid = int(self._status.recv(100))

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            code, seconds = self._status.recv(100).split()
            self._status.close()
            cpu_seconds[0] += float(seconds)
            self.returncode = int(code)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            select.select([self._status], [], [], timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


@contextmanager
def float32_on_cpus() -> Iterator[None]:
    """Within it no CPU has instructions for bfloat16 when `dtype=auto` is resolved."""
    from hrm.engine import modes

    here = modes.multiplies_bfloat16
    modes.multiplies_bfloat16 = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        modes.multiplies_bfloat16 = here


def start(
    words: Sequence[str], env: Mapping[str, str] | None = None, fork: bool = True, **options: Any
) -> Any:
    """Runs `python WORD...` in the project's root; forked if libraries would load with the same variables."""
    env = dict(os.environ if env is None else env)
    if fork and _read_at_load(env) == _read_at_load(_server()[1]):
        return Forked(words, env, **options)
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, **options)


def popen(command: Sequence[str], *, env: Mapping[str, str], stdout: Stream, **_: Any) -> Any:
    """`start` in place of `subprocess.Popen` for a Python program with no input and one output."""
    with open(os.devnull) as nothing:
        return start(command[1:], env, stdin=nothing, stdout=stdout, stderr=stdout)


def _read_at_load(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(READ_AT_LOAD)}


@cache
def _server() -> tuple[socket.socket, dict[str, str]]:
    """The connection to the forking process, which is started at the first use, and its environment."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    environment = dict(os.environ)
    with theirs:
        command = [sys.executable, "-m", "tests.support.forked", str(theirs.fileno())]
        # Stay in this process group, so that a signal to the group ends all processes.
        subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
    atexit.register(ours.close)
    return ours, environment


def serve(requests: socket.socket) -> list[str]:
    """Forks for each request; returns the request in the child process."""
    # Ctrl-C ends the tests; then this process ends because its connection closes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The system reaps the waiting processes.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1 << 18, 4)
        if not message:
            sys.exit()
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    words, env, new_session = json.loads(message)
    status = files.pop()
    if pid := os.fork():
        os.closerange(0, status)
        os.write(status, str(pid).encode())
        _, code, usage = os.wait4(pid, 0)
        seconds = usage.ru_utime + usage.ru_stime
        os.write(status, f"{os.waitstatus_to_exitcode(code)} {seconds}".encode())
        os._exit(0)
    if new_session:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    become(env)
    if words[:2] == TORCHRUN:
        handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
        setattr(importlib.import_module(handler), "Popen", Rank)  # noqa: B010
    return words


def become(env: Mapping[str, str]) -> None:
    """Sets the environment, and resets the process to the state of a new one."""
    os.environ.clear()
    os.environ.update(env)
    paths = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(words: list[str]) -> None:
    """Runs the program of `python WORD...`."""
    name, *rest = words
    if name == "-m":
        sys.argv = rest
        # Remove it from sys.modules to avoid a warning.
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif name == "-c":
        sys.argv = [name, *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(name).resolve().parent))
        runpy.run_path(name, run_name="__main__")


def leave(status: object) -> None:
    """Ends the process with an exit status without freeing modules, which would take half a second."""
    if status is None or isinstance(status, int):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        # Let the interpreter's exit handle a stream that cannot be written.
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)
    sys.exit(status)  # type: ignore[arg-type]


class Rank(subprocess.Popen):
    """Runs a rank that torchrun's agent forks. It ends by `os._exit`, because the agent's stack is below
    it."""

    def _execute_child(
        self, args: Any, executable: Any, preexec: Any, close: Any, passed: Any, cwd: Any, env: Any, *_: Any
    ) -> None:
        sys.stdout.flush()
        self._child_created = True
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        become(env)
        # torchrun starts `python -u`.
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        status: object = 1
        try:
            run([word for word in args[1:] if word != "-u"])
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        with suppress(BaseException):
            leave(status)
        os._exit(1)


if __name__ == "__main__":
    for module in PRELOADED:
        importlib.import_module(module)
    # Forked processes then do not copy pages for the garbage collector's counts.
    import gc

    gc.collect()
    gc.freeze()
    with float32_on_cpus():
        words = serve(socket.socket(fileno=int(sys.argv[1])))
        try:
            run(words)
        except SystemExit as end:
            leave(end.code)
        leave(0)
