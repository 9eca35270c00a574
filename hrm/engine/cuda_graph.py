"""Runs a fixed-shape part of a step, directly or from a CUDA graph captured after a warm-up."""

from collections.abc import Callable
from typing import Any

import torch

Body = Callable[[], None]

# Direct calls before a capture, during which kernels compile and libraries choose kernels and workspaces.
WARM_UP = 3


class Program:
    """A function without arguments that reads and writes tensors at fixed addresses.

    captured: on CUDA, the call after WARM_UP records its launches, and later calls replay them without
    running its Python. The function must then depend only on those tensors and must not wait for the device.
    Every call has the effect of exactly one run, including warm-up and capture.
    """

    def __init__(self, body: Body, device: torch.device, *, captured: bool) -> None:
        self._body, self._device, self._captured = body, device, captured
        self._calls = 0
        self._replay: Body | None = None

    def __call__(self) -> None:
        if self._replay is not None:
            self._replay()
        elif not self._captured:
            self._body()
        elif self._calls < WARM_UP:
            self._calls += 1
            aside(self._body, self._device)
        else:
            # A capture records without running, so replay once.
            self._replay = capture(self._body, self._device)
            self._replay()


# Keyed by the device's index: `cuda` and `cuda:0` are one device.
_streams: dict[int, torch.cuda.Stream] = {}
_pools: dict[int, Any] = {}


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of warm-up and capture on a device; a single one, so that autograd sees one stream."""
    index = _index(device)
    if index not in _streams:
        _streams[index] = torch.cuda.Stream(index)
    return _streams[index]


def _pool(device: torch.device) -> Any:
    """The memory pool shared by all graphs of a device."""
    index = _index(device)
    if index not in _pools:
        _pools[index] = torch.cuda.graph_pool_handle()
    return _pools[index]


def aside(body: Callable[[], object], device: torch.device) -> None:
    """Runs a body on the stream of captures, in order with the work of the current stream."""
    stream, current = _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        body()
    current.wait_stream(stream)


def capture(body: Body, device: torch.device) -> Body:
    """Records a body's launches as a CUDA graph; returns the function that replays them.

    All graphs of a device share one memory pool: they run one at a time, and no replay reads data of another
    replay from the pool.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    # Check only this thread's calls: a call of another thread, such as NCCL's watchdog, must not end the
    # capture.
    mode = "thread_local"
    with torch.cuda.graph(graph, pool=_pool(device), stream=_stream(device), capture_error_mode=mode):
        body()
    return graph.replay
