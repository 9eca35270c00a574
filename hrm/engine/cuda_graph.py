"""A fixed-shape part of a step: called directly, or captured in a CUDA graph once it is warm and replayed."""

from collections.abc import Callable
from typing import Any

import torch

Body = Callable[[], None]

# Calls that run directly before a capture: kernels are compiled, libraries choose theirs and take workspaces.
WARM_UP = 3


class Program:
    """A function without arguments that reads and writes tensors which stay where they are.

    captured: on CUDA, to record its launches at the call after WARM_UP and to replay them from then on, in
    place of running its Python. So what it does must depend on those tensors alone, and it must not wait
    for the device. Every call, warm-up and capture included, has the effect of one.
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
            # A capture records without running.
            self._replay = capture(self._body, self._device)
            self._replay()


# By the device's number: `cuda` and `cuda:0` are one device.
_streams: dict[int, torch.cuda.Stream] = {}
_pools: dict[int, Any] = {}


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that warm-up and capture share on a device, so that autograd meets one stream alone."""
    index = _index(device)
    if index not in _streams:
        _streams[index] = torch.cuda.Stream(index)
    return _streams[index]


def _pool(device: torch.device) -> Any:
    """The memory that all graphs of a device share."""
    index = _index(device)
    if index not in _pools:
        _pools[index] = torch.cuda.graph_pool_handle()
    return _pools[index]


def aside(body: Body, device: torch.device) -> None:
    """Runs a body on the stream of captures, between what this stream has been given and is given next."""
    stream, current = _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        body()
    current.wait_stream(stream)


def capture(body: Body, device: torch.device) -> Body:
    """Records a body's launches as a CUDA graph; returns what replays them.

    All graphs of a device share one pool of memory: they run one after the other, and nothing in the pool
    is read after the replay that wrote it.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    # Only this thread's calls count: another one's, as of NCCL's watchdog, must not end the capture.
    mode = "thread_local"
    with torch.cuda.graph(graph, pool=_pool(device), stream=_stream(device), capture_error_mode=mode):
        body()
    return graph.replay
