"""The folder of a run: locked for one process, and cleared of any other run by moving that one aside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

from hrm.common.errors import UserError
from hrm.common.files import open_own, write_whole
from hrm.config.load import Config, to_yaml

if TYPE_CHECKING:
    from hrm.distributed import World

# The files of a run beside its checkpoints.
CONFIG, METRICS, INCIDENTS = "config.yaml", "metrics.jsonl", "incidents.jsonl"
# Bytes of a line of METRICS; a run writes shorter ones.
LONGEST_LINE = 2**20


def folder_of(config: Config) -> Path:
    """The folder of a run: `output_dir`/`project_name`/`run_name`."""
    return Path(config.output_dir) / config.project_name / config.run_name


@contextmanager
def run_folder(
    config: Config, checkpoint: Path | None, world: "World", say: Callable[[str], None]
) -> Iterator[Path]:
    """A run's folder with its config.yaml, locked for this process; all ranks enter it together.

    Moves an earlier run in it aside, unless the run continues from `checkpoint` in that very folder. Raises
    UserError if another process trains there or the folder cannot be written.
    """
    path = folder_of(config)
    with run_lock(path) if world.is_main else nullcontext():
        world.barrier()
        if world.is_main:
            continues = checkpoint is not None and checkpoint.parent.resolve() == path.resolve()
            if not continues and (path / CONFIG).exists() and config.resume != "auto":
                say(f"the earlier run in {path} is kept as {set_aside(path)}")
            path.mkdir(parents=True, exist_ok=True)
            write_whole(path / CONFIG, to_yaml(config))
        yield path


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Holds a run's folder for this process alone, until the context or the process ends.

    The lock lies beside the folder, which may be moved meanwhile. Raises UserError if another process has it.
    """
    path = run_dir.with_name(f".{run_dir.name}.lock")
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        file = open_own(path, "a")
    except OSError as error:
        raise UserError(f"output folder {run_dir}: {error.strerror}; give another output_dir=PATH") from None
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{run_dir}: another process trains this run; give another run_name") from None
        yield


def set_aside(run_dir: Path) -> Path:
    """Moves a run's folder to the first free name beside it and returns that name."""
    number = 1
    while (kept := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    try:
        return run_dir.rename(kept)
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be moved aside ({error.strerror}); give another run_name"
        ) from None
