"""Every target, by name."""

from tests.fuzz import checkpoints, configurations, datasets, puzzles
from tests.fuzz.judge import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (configurations, puzzles, datasets, checkpoints)
    for target in module.TARGETS
}
