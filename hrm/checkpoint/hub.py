"""Checkpoints on the Hugging Face hub: which files of a repository are downloaded."""

import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path, PurePosixPath

from hrm.checkpoint.foreign import CONFIG_FILES, choose_file
from hrm.checkpoint.identifiers import IDENTIFIERS, NAMES
from hrm.checkpoint.read import MANIFEST, STEP_NAME, TENSORS_NAME, TRAINING
from hrm.checkpoint.safe_io import CheckpointError
from hrm.common.hub import fetch
from hrm.distributed import World, place

_Path = PurePosixPath


def fetch_checkpoint(source: str, world: World | None = None) -> Path:
    """The local folder or file of a checkpoint on the hub, downloaded if it is not in the cache.

    source: `hub:OWNER/NAME`, optionally with `@REVISION` and `/PATH`, a folder or file of the repository.
    Only weights, configurations and puzzle names are downloaded. world: the ranks that call this together;
    one rank per machine downloads, the others wait. Raises HubError as `hrm.common.hub.fetch` does, and
    CheckpointError for a repository that holds no checkpoint or several.
    """
    world = world or World()
    downloads = world.size == 1 or place().local_rank == 0
    chosen = partial(_files, source)
    if downloads:
        root, files = fetch(source, "model", chosen, partial(print, file=sys.stderr, flush=True))
    world.barrier()
    # The ranks of one machine share its cache.
    if not downloads:
        root, files = fetch(source, "model", chosen, None)
    # The client names a version's folder by its commit.
    world.check_equal({source: root.name})
    first = root / files[0]
    return first.parent if first.name == MANIFEST else first


def _files(source: str, names: Collection[str], path: str) -> list[str]:
    """The files of a checkpoint; the first is this trainer's manifest, or another trainer's weights file."""
    chosen = _checkpoint(source, names, path)
    if str(chosen) in names:
        files, folder, beside = [str(chosen)], chosen.parent, {*CONFIG_FILES, IDENTIFIERS, NAMES}
    else:
        own = sorted(p.name for p in map(_Path, names) if p.parent == chosen)
        own = [name for name in own if name == TRAINING or TENSORS_NAME.fullmatch(name)]
        files, folder, beside = [str(chosen / name) for name in (MANIFEST, *own)], chosen, set(CONFIG_FILES)
    # A configuration may be next to the folder of the weights.
    near = {str(place / name) for place in (folder, folder.parent) for name in beside} & set(names)
    return files + sorted(near - set(files))


def _checkpoint(source: str, names: Collection[str], path: str) -> PurePosixPath:
    """The weights file, or the folder of this trainer's checkpoint, at a path in a repository."""
    base = _Path(path)
    if path in names:
        return base
    inside = [_Path(name).relative_to(base) for name in names if _Path(name).is_relative_to(base)]
    if _Path(MANIFEST) in inside:
        return base
    steps = [p.parent for p in inside if p.name == MANIFEST and len(p.parts) == 2]
    own = {
        int(match[1]): step for step in steps if (match := STEP_NAME.fullmatch(step.name)) and not match[2]
    }
    if own:
        return base / own[max(own)]
    deepest = max((len(p.parts) for p in inside), default=0)
    found = choose_file(inside, source, deepest)
    if found is None:
        raise CheckpointError(
            f"{source}: no file of weights there; expected a repository, or a folder of it, that holds one "
            "(safetensors, .pt, .pth, .ckpt, step_N, checkpoint)"
        )
    return base / found
