"""The schedule of a run in epochs: evaluation intervals and stages."""

import math
from bisect import bisect_right
from dataclasses import asdict, replace
from itertools import accumulate

from hrm.config.schema import ArchConfig, Config


def interval_epochs(config: Config) -> int:
    """Epochs between evaluations."""
    return config.eval_interval or config.epochs


def stage_ends(config: Config) -> list[int]:
    """The epoch at which each stage ends; a run without stages is one stage."""
    return list(accumulate(stage.epochs for stage in config.stages)) if config.stages else [config.epochs]


def stage_arch(config: Config, epoch: int) -> ArchConfig:
    """The architecture of the stage that trains `epoch`, counted from 0."""
    if not config.stages:
        return config.arch
    stage = config.stages[min(bisect_right(stage_ends(config), epoch), len(config.stages) - 1)]
    given = {name: value for name, value in asdict(stage).items() if name != "epochs" and value is not None}
    return replace(config.arch, **given)


def later_archs(config: Config, epoch: int) -> list[ArchConfig]:
    """The different architectures of the stages after the stage that trains `epoch`, in order."""
    found: list[ArchConfig] = [stage_arch(config, epoch)]
    for end in stage_ends(config)[:-1]:
        arch = stage_arch(config, max(end, epoch))
        if arch not in found:
            found.append(arch)
    return found[1:]


def fitting_interval(config: Config, longest: int) -> int:
    """The longest interval, at most `longest`, that divides the end of every stage."""
    common = math.gcd(*stage_ends(config)[:-1])
    if not common:
        return min(longest, config.epochs)
    small = [number for number in range(1, math.isqrt(common) + 1) if common % number == 0]
    return max(epochs for number in small for epochs in (number, common // number) if epochs <= longest)
