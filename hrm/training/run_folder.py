"""The folder of a run: locks it for one process, and renames the folder of an earlier run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows has no file locks of this kind
    fcntl = None  # type: ignore[assignment]

from hrm.common.errors import UserError
from hrm.common.files import open_own, write_whole
from hrm.config.load import Config, to_yaml

if TYPE_CHECKING:
    from hrm.distributed import World

# The files of a run besides its checkpoints.
CONFIG, METRICS, INCIDENTS = "config.yaml", "metrics.jsonl", "incidents.jsonl"
# Maximum bytes of a line of METRICS; a run writes shorter lines.
LONGEST_LINE = 2**20


def folder_of(config: Config) -> Path:
    """The folder of a run: `output_dir`/`project_name`/`run_name`."""
    return Path(config.output_dir) / config.project_name / config.run_name


@contextmanager
def run_folder(
    config: Config, checkpoint: Path | None, world: "World", say: Callable[[str], None]
) -> Iterator[Path]:
    """A run's folder with its config.yaml, locked for this process; all ranks enter it together.

    Renames the folder of an earlier run, unless the run continues from `checkpoint` in this folder. Raises
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
    """Locks a run's folder for this process until the context or the process ends.

    The lock file is next to the folder, which may be renamed. Raises UserError if another process holds it.
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
    """Renames a run's folder to the first free name and returns it."""
    number = 1
    while (kept := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    try:
        return run_dir.rename(kept)
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be renamed ({error.strerror}); give another run_name") from None
