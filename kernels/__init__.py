"""The operations of a hierarchical reasoning model, one file each, behind one door.

Knows nothing of `hrm`: tensors in, tensors out. Each file holds its mathematics in the docstring, the
reference in plain PyTorch, and last the public function that checks its arguments.
"""

from kernels.adam_atan2 import adam_atan2
from kernels.attention import attention
from kernels.backend import get_backend, set_backend
from kernels.gate_mix import gate_mix
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.stablemax import softmax_cross_entropy, stablemax_cross_entropy
from kernels.swiglu import swiglu

__all__ = [
    "adam_atan2",
    "attention",
    "gate_mix",
    "get_backend",
    "rms_norm",
    "rope",
    "set_backend",
    "softmax_cross_entropy",
    "stablemax_cross_entropy",
    "swiglu",
]
