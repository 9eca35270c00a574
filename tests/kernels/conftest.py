"""Every test here runs the Triton kernels: on the GPU, or in the interpreter on the CPU."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels import backend


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    """Triton for every operation, and NaN in all memory that a launcher allocates and a kernel must fill."""
    if backend.triton is None:
        pytest.skip("Triton is not installed; it is not built for this system")
    before = backend.get_backend()
    backend.set_backend("triton")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    backend.set_backend(before)


@pytest.fixture(autouse=True, scope="session")
def rounding_interpreter() -> Iterator[None]:
    """The interpreter cuts float32 off when it makes a bfloat16 of it; here it rounds, as a GPU does."""
    if not backend.INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    builder, tl = interpreter.InterpreterBuilder, backend.tl
    options = interpreter.interpreter_builder.options
    cut = builder.cast_impl

    def cast(self, source, target):
        types = source.dtype.scalar, target.scalar
        if types == (tl.float32, tl.bfloat16):
            data = np.ascontiguousarray(source.data, dtype=np.float32)
            bits = torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            wide = (np.asarray(source.data, dtype=np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(wide, tl.float32)
        return cut(self, source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", cast)
        # It computes whether integers overflow, and without debug asserts nothing of it.
        unchecked = replace(options, sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", unchecked)
        yield


@pytest.fixture(autouse=True, scope="module")
def language_patched_once() -> Iterator[None]:
    """The interpreter patches Triton's language at each launch and each call of a helper; here once a file.

    That takes half of the time of a small launch. Tests of other folders find the language as it was.
    """
    if not backend.INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        yield
        return
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": backend.tl, "core": backend.tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        yield
    scope.restore()
