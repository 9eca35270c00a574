"""The operations of a hierarchical reasoning model, one file each.

The package is independent of `hrm`. Each file has the mathematics in its docstring, the reference in plain
PyTorch, and at the end the public function, which checks its arguments.
"""

from kernels.adam_atan2 import adam_atan2, adamw
from kernels.attention import attention
from kernels.backend import get_backend, set_backend
from kernels.conv_swiglu import conv_swiglu
from kernels.gate_mix import gate_mix
from kernels.linear import linear
from kernels.linear_rms import linear_rms, linear_scaled
from kernels.linear_swiglu import linear_swiglu
from kernels.lm_head import lm_head_softmax, lm_head_stablemax
from kernels.muon import muon_momentum, muon_update
from kernels.noise import noisy_update, random_start
from kernels.normed_swiglu_mlp import normed_swiglu_mlp
from kernels.rms_norm import rms_norm, rms_norm_pair
from kernels.rope import rope
from kernels.sign_sgd import sign_sgd
from kernels.stablemax import softmax_cross_entropy, stablemax_cross_entropy
from kernels.swiglu import swiglu
from kernels.swiglu_mlp import swiglu_mlp

__all__ = [
    "adam_atan2",
    "adamw",
    "attention",
    "conv_swiglu",
    "gate_mix",
    "get_backend",
    "linear",
    "linear_rms",
    "linear_scaled",
    "linear_swiglu",
    "lm_head_softmax",
    "lm_head_stablemax",
    "muon_momentum",
    "muon_update",
    "noisy_update",
    "normed_swiglu_mlp",
    "random_start",
    "rms_norm",
    "rms_norm_pair",
    "rope",
    "set_backend",
    "sign_sgd",
    "softmax_cross_entropy",
    "stablemax_cross_entropy",
    "swiglu",
    "swiglu_mlp",
]
