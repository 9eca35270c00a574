"""Jobs that torchrun starts, for the tests of ranks."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

PROGRAM = Path(__file__).with_name("rank_program.py")


class Ended(NamedTuple):
    """One node's torchrun: its exit status and all that its ranks and it wrote."""

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
) -> list[Ended]:
    """Runs a program by one torchrun for each node, `ranks` on each, until all have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = [f"--rdzv-endpoint=127.0.0.1:{port}"]
    if "--rdzv-backend=c10d" not in options:
        meeting = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *meeting, *options]
    agents = [
        subprocess.Popen(
            [*command, f"--nnodes={nodes}", f"--node-rank={node}", *program],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(nodes)
    ]
    try:
        texts = [agent.communicate()[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    return [Ended(agent.returncode, text) for agent, text in zip(agents, texts, strict=True)]
