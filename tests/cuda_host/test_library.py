"""The stand-in library sees each breach of the rules of capture, and nothing where there is none."""

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

from tests.cuda_host.stand_in import Record, StandIn, active, read_log

pytestmark = pytest.mark.cuda_host


@pytest.fixture
def library() -> StandIn:
    """Without the check that no rule was broken."""
    found = active()
    assert found is not None
    return found


def captured(body: Callable[[torch.Tensor], object], mode: str = "global") -> None:
    """Captures what `body` does with a tensor that was allocated before."""
    x, graph, stream = torch.zeros(64, device="cuda"), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    # PyTorch leaves the current stream as it is where the end of a capture fails.
    restored = torch.cuda.stream(torch.cuda.current_stream())
    with restored, torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        x.add_(1)
        body(x)


def another_stream() -> torch.cuda.Stream:
    """PyTorch hands out its 32 streams by turns, and the current one may be next."""
    current = torch.cuda.current_stream()
    return next(stream for stream in iter(torch.cuda.Stream, None) if stream != current)


def forked(x: torch.Tensor, *, joins: bool) -> None:
    main, side = torch.cuda.current_stream(), another_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        x.add_(1)
    if joins:
        main.wait_stream(side)


def in_thread(function: Callable[[], object]) -> None:
    def run() -> None:
        with suppress(RuntimeError):
            function()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def on_legacy_stream(x: torch.Tensor) -> None:
    with torch.cuda.stream(torch.cuda.default_stream()):
        x.add_(1)


def on_other_stream(x: torch.Tensor) -> None:
    with torch.cuda.stream(another_stream()):
        x.add_(1)


def copy_pageable(x: torch.Tensor) -> None:
    # PyTorch itself refuses such a copy; a library may not.
    host = torch.ones(64)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    addresses = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(host.data_ptr())
    library = ctypes.CDLL(None)
    library.cudaMemcpyAsync(*addresses, ctypes.c_size_t(256), 1, stream)
    library.cudaGetLastError()


def query_captured_event(x: torch.Tensor) -> None:
    event = torch.cuda.Event()
    event.record()
    event.query()


def wait_for_event_from_outside(x: torch.Tensor) -> None:
    event = torch.cuda.Event()
    # A recording by a thread that captures nothing is none of the capture's.
    in_thread(lambda: event.record(torch.cuda.Stream()))
    torch.cuda.current_stream().wait_event(event)


BREACHES = {
    "cudaStreamSynchronize of a captured stream": lambda x: x.sum().item(),
    "cudaDeviceSynchronize during a capture": lambda x: torch.cuda.synchronize(),
    "from pageable to device memory": copy_pageable,
    "a capture ends before its origin waits": lambda x: forked(x, joins=False),
    "on the legacy stream during a capture": on_legacy_stream,
    "which the capture of this thread does not record": on_other_stream,
    "which was recorded in a capture": query_captured_event,
    "recorded outside of the capture": wait_for_event_from_outside,
    "cudaHostAlloc during a capture": lambda x: in_thread(lambda: torch.empty(1 << 22, pin_memory=True)),
}


@pytest.mark.parametrize("text", BREACHES)
def test_a_breach_is_a_violation(library, text, capfd):
    before = library.violations
    try:
        captured(BREACHES[text])
    except RuntimeError:
        torch.cuda.synchronize()
    assert library.violations > before
    assert text in capfd.readouterr().err


def test_allowed_contents_are_not_violations(stand_in):
    captured(lambda x: forked(x, joins=True))
    # In this mode other threads' calls are their own business.
    captured(lambda x: in_thread(lambda: torch.empty(1 << 23, pin_memory=True)), mode="thread_local")


def test_a_failed_capture_gives_no_graph(library):
    with pytest.raises(RuntimeError):
        captured(lambda x: x.sum().item())
    captured(lambda x: x.mul_(2))


def test_the_log_has_nodes_parts_and_replays(stand_in, tmp_path):
    x, graph, stream = torch.zeros(64, device="cuda"), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    log = tmp_path / "log"
    with stand_in.log(log):
        with torch.cuda.graph(graph, stream=stream), stand_in.part("outer"), stand_in.part("inner"):
            x.add_(1)
        graph.replay()
        x.cpu()
    records = read_log(log)
    # PyTorch 2.11 fills the state of its random generator before it begins a capture.
    del records[: [r.kind for r in records].index("capture")]

    def one(kind: str, **facts: object) -> Record:
        found = [r for r in records if r.kind == kind and facts.items() <= r.facts.items()]
        assert len(found) == 1, records
        return found[0]

    kernel = one("kernel", source="aten", grid=[1, 1, 1])
    assert kernel.parts == ("outer", "inner") and kernel.graph > 0 and kernel.origin == "aten"
    assert one("graph", replays=kernel.graph).name == "launch"
    end = [r for r in records if r.kind == "capture" and r.name == "end"]
    assert [(r.facts["kernels"], r.facts["streams"]) for r in end] == [(1, 1)]
    assert one("memcpy", bytes=256).facts["to"] == "pageable"
    assert "cudaStreamSynchronize" in {r.name for r in records if r.kind == "sync"}


def test_arguments_of_a_triton_kernel_are_logged(stand_in, tmp_path):
    from kernels import rms_norm

    x = torch.zeros(6, 128, device="cuda", dtype=torch.bfloat16)
    log = tmp_path / "log"
    rms_norm(x, x)
    with stand_in.log(log):
        rms_norm(x, x)
    kernel = next(r for r in read_log(log) if r.kind == "kernel" and r.origin == "custom")
    assert kernel.name == "_rms_norm_forward_kernel"
    assert [8, x.data_ptr()] in kernel.facts["args"] and [4, 6] in kernel.facts["args"]


def test_memory_is_counted_and_runs_out(stand_in):
    free, total = torch.cuda.mem_get_info()
    held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    assert free - torch.cuda.mem_get_info()[0] == held.numel()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(total, dtype=torch.uint8, device="cuda")
