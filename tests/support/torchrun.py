"""Jobs that torchrun starts, for the tests of ranks."""

import os
import socket
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tests.support.forked import TORCHRUN, start
from tests.support.paths import ROOT

PROGRAM = Path(__file__).with_name("rank_program.py")


class Ended(NamedTuple):
    """torchrun on one node: its exit status, and the output of it and its ranks."""

    status: int
    text: str

    def lines(self, start: str) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith(start)]


def torchrun(
    ranks: int,
    *program: str,
    nodes: int = 1,
    options: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    fork: bool = True,
) -> list[Ended]:
    """Runs a program with one torchrun per node and `ranks` ranks on each, until all have ended.

    fork: whether torchrun and its ranks may be forked from a process that has imported the trainer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = [f"--rdzv-endpoint=127.0.0.1:{port}"]
    if "--rdzv-backend=c10d" not in options:
        meeting = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [*TORCHRUN, f"--nproc-per-node={ranks}", *meeting, *options, f"--nnodes={nodes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    with ExitStack() as stack:
        outputs, agents = [], []
        for node in range(nodes):
            outputs.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            words = [*command, f"--node-rank={node}", *program]
            agents.append(start(words, env, fork=fork, stdout=outputs[node], stderr=outputs[node]))
            stack.callback(agents[node].terminate)
        for agent in agents:
            agent.wait()
        for output in outputs:
            output.seek(0)
        return [Ended(agent.returncode, out.read()) for agent, out in zip(agents, outputs, strict=True)]
