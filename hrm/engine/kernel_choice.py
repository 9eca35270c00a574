"""Chooses the implementations of a run's operations once, before anything is compiled or captured.

On CUDA a new run uses the fastest implementations on its GPU, measured now or by an earlier run. The main
rank measures or reads a table, and every rank uses it. A checkpoint stores the table and a resumed run reuses
it, because other kernels round differently. A run resumed from a checkpoint without a table uses none.
`deterministic=true` measures nothing, because another measurement may give another result.
"""

from collections.abc import Callable

import torch

from hrm.distributed import World
from hrm.engine.engine import Engine
from hrm.model.layers import ROTARY, swiglu_width
from kernels import backend, measured
from kernels.cases import Sizes

NOTHING = backend.Table({}, {})
# A shorter run would not regain the time to measure, so it uses an earlier measurement.
LEAST_STEPS = 1000
Measure = Callable[..., backend.Table]


def choose_kernels(
    engine: Engine,
    *,
    recorded: object,
    resumes: bool,
    say: Callable[[str], None],
    measure: Measure = measured.once,
) -> str:
    """Installs the run's table on every rank; returns it in the form for checkpoints, empty for none.

    recorded: the table in the resumed checkpoint, or None. measure: a function like `kernels.measured.once`.
    """
    backend.install(NOTHING)
    config, world, device = engine.config, engine.world, engine.device
    text = recorded if isinstance(recorded, str) else ""
    if device.type != "cuda" or backend.get_backend() != "auto":
        return text
    maker = measured.made_by(device)
    kept = measured.from_text(text, maker)
    if kept is None and text and not config.deterministic:
        say("kernels: the checkpoint's choice is for another GPU or other versions, so it is measured again")
    if kept is None and not config.deterministic and (text or not resumes):
        if world.is_main:
            if engine.total_steps < LEAST_STEPS:
                earlier = measured.load(maker)
                table = NOTHING if earlier is None else earlier.table
            else:
                only, dtype = measured_cases(engine), engine.model.dtype
                table = measure(sizes(engine), dtype, device, only, say=say)
            text = measured.to_text(measured.Kept(maker, table, [], []))
        text = from_main(world, text, device)
        kept = measured.from_text(text, maker)
    if kept is None:
        return ""
    backend.install(kept.table)
    return text


def take_measured(device: torch.device) -> None:
    """Uses an earlier measurement on this GPU, if there is one; measures nothing."""
    kept = None
    if device.type == "cuda" and backend.get_backend() == "auto":
        kept = measured.load(measured.made_by(device))
    backend.install(NOTHING if kept is None else kept.table)


def from_main(world: World, text: str, device: torch.device) -> str:
    """Broadcasts the main rank's text to every rank."""
    if world.size == 1:
        return text
    own = text.encode() if world.is_main else b""
    length = int(world.broadcast(torch.tensor([len(own)], device=device)).item())
    carried = torch.zeros(length, dtype=torch.uint8, device=device)
    if world.is_main:
        carried.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    return bytes(world.broadcast(carried).tolist()).decode()


def sizes(engine: Engine) -> Sizes:
    """The sizes of one part of a rank's step."""
    config, arch, metadata = engine.config, engine.config.arch, engine.metadata
    return Sizes(
        batch_size=config.global_batch_size // engine.world.size // config.gradient_accumulation,
        length=engine.model.length,
        hidden_size=arch.hidden_size,
        num_heads=arch.num_heads,
        vocab_size=metadata.vocab_size,
        cells=metadata.seq_len,
        inner_size=swiglu_width(arch.hidden_size, arch.expansion),
        gate_size=max(1, int(arch.gate_hidden_ratio * arch.hidden_size)),
        parameters=engine.parameters.data.numel(),
    )


def measured_cases(engine: Engine) -> list[str]:
    """The operations of a training step, by their names in `kernels.cases`, in its order."""
    config, arch = engine.config, engine.config.arch
    if arch.swiglu == "normed":
        found = ["rms_norm forward", "normed_swiglu_mlp forward", "rms_norm", "normed_swiglu_mlp"]
    elif arch.swiglu == "conv":
        found = ["rms_norm forward", "conv_swiglu forward", "rms_norm", "conv_swiglu"]
    else:
        found = ["rms_norm forward", "linear_swiglu", "rms_norm", "swiglu", "swiglu_mlp"]
    if not arch.mlp_t:
        found[1:1] = ["deferred_norm"] * (arch.swiglu != "normed")
        # A backend set in the configuration is used without measuring.
        if config.attention.backend == "auto" and arch.pos_encodings in ROTARY:
            found[1:1] = ["rope", "attention forward", "attention"]
    if arch.use_gating and arch.gating_type == "standard":
        found += ["gate_mix", "gate_mix_two"]
    found += [f"lm_head_{config.loss.loss_type.partition('_')[0]}"]
    if config.optimizer != "muon":
        # Muon's parts have buffers of several sizes, and always use the kernels if these can run.
        found += [config.optimizer]
    return found + ["sign_sgd"] * (engine.model.puzzle_emb is not None)
