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


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that warm-up and capture share on a device, so that autograd meets one stream alone."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


_streams: dict[torch.device, torch.cuda.Stream] = {}
_pools: dict[torch.device, Any] = {}


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
    if device not in _pools:
        _pools[device] = torch.cuda.graph_pool_handle()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, pool=_pools[device], stream=_stream(device)):
        body()
    return graph.replay
