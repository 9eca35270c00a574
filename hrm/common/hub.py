"""Repositories of the Hugging Face hub, cached by its client; needs the extra `hub`."""

import importlib
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hrm.common.errors import UserError
from hrm.common.text import counted, one_line, size_text

PREFIX = "hub:"
FORM = f"{PREFIX}OWNER/NAME, with @REVISION or /PATH after it where needed"
# The hub's pattern of names, which cannot lead out of the cache's folder.
_SOURCE = re.compile(
    r"hub:([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w.-]{1,100}))?((?:/[^/\\]+)*)", re.ASCII
)
_WORDS = {"dataset": "data set", "model": "model"}

# Takes the names of a repository's files and the user's path; returns the names to download.
Choice = Callable[[Collection[str], str], Sequence[str]]


class HubError(UserError):
    """A repository that cannot be found, reached or used; the message names it and gives a remedy."""


class _Repository(NamedTuple):
    """A repository given by the user. path: a folder or file in it, or empty."""

    source: str
    name: str
    revision: str | None
    path: str
    kind: Literal["dataset", "model"]
    hub: Any
    errors: Any

    @property
    def asked(self) -> dict[str, Any]:
        return {"repo_id": self.name, "repo_type": self.kind, "revision": self.revision}


def is_remote(source: str | Path) -> bool:
    """Whether the user gave a hub repository instead of a folder or file."""
    return str(source).startswith(PREFIX)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fetch_files(source: str, files: Sequence[str]) -> Path:
    """The folder with these files of a data set, downloaded if they are not in the cache.

    source: `hub:OWNER/NAME`, such as hub:sapientinc/sudoku-extreme, optionally with `@REVISION` and the
    `/PATH` of a folder. files: their paths in that folder. Raises HubError as `fetch` does.
    """

    def choose(names: Collection[str], path: str) -> list[str]:
        wanted = [f"{path}/{file}".lstrip("/") for file in files]
        for name in wanted:
            if name not in names:
                raise HubError(f"{source}: no file {name} in this data set; expected one with it")
        return wanted

    root, chosen = fetch(source, "dataset", choose)
    return (root / chosen[0]).parents[len(Path(files[0]).parts) - 1]


def fetch(
    source: str,
    kind: Literal["dataset", "model"],
    choose: Choice,
    say: Callable[[str], None] | None = _report,
) -> tuple[Path, Sequence[str]]:
    """The cache folder of a repository with the chosen files, and their names.

    source: see `fetch_files`. say: prints a line with the size before the download; None uses only the cache,
    which another process of this machine has filled. Without a network only the cache is used. Raises
    HubError if huggingface_hub is missing, the hub cannot be reached, it has no such repository, or the disk
    is too small; and the errors of `choose`.
    """
    repository = _parse(source, kind)
    sizes, commit, cached = _cached(repository) if say is None else _listing(repository)
    if cached is not None:
        try:
            return cached, choose(sizes, repository.path)
        except UserError:
            raise HubError(_unreachable(source)) from None
    files = choose(sizes, repository.path)
    assert say is not None
    _check_size(repository, {file: sizes[file] for file in files}, commit, say)
    roots = [_root(repository, file) for file in files]
    if len(set(roots)) != 1:
        raise HubError(f"{source}: it changed during the download; run the command again")
    return roots[0], files


def _parse(source: str, kind: Literal["dataset", "model"]) -> _Repository:
    match = _SOURCE.fullmatch(source)
    parts = match[3].split("/")[1:] if match else []
    if match is None or {".", ".."} & {*parts, match[2]}:
        raise HubError(f"{source}: expected {FORM}")
    try:
        hub, errors = map(importlib.import_module, ("huggingface_hub", "huggingface_hub.utils"))
    except ImportError:
        raise HubError(
            f"{source}: the hub needs the package huggingface_hub; pip install -e '.[hub]', or give a folder "
            "with the files"
        ) from None
    return _Repository(source, match[1], match[2], "/".join(parts), kind, hub, errors)


def _listing(repository: _Repository) -> tuple[dict[str, int], str | None, Path | None]:
    """The bytes of each file and the version's commit; without a network, the cache's folder."""
    hub, errors = repository.hub, repository.errors
    try:
        with _refusals(repository):
            info = hub.HfApi().repo_info(**repository.asked, files_metadata=True)
    except HubError:
        raise
    # Any error of httpx, requests or the system.
    except Exception as error:
        reason = None if isinstance(error, errors.OfflineModeIsEnabled) else error
        return _cached(repository, reason)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return {name: size for name, size in sizes.items() if _is_inside(name)}, info.sha, None


def _cached(repository: _Repository, reason: Exception | None = None) -> tuple[dict[str, int], None, Path]:
    """Same as `_listing`, for files in the cache. reason: why the hub cannot be reached."""
    download = repository.hub.snapshot_download
    try:
        folder = Path(download(**repository.asked, local_files_only=True, allow_patterns=[]))
    except Exception:
        raise HubError(_unreachable(repository.source, reason)) from None
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}, None, folder


def _is_inside(name: str) -> bool:
    """Whether a file's name cannot lead out of the cache's folder."""
    return "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _unreachable(source: str, reason: Exception | None = None) -> str:
    why = f" ({one_line(reason)})" if reason is not None else ""
    return (
        f"{source}: it is not in the cache and the hub cannot be reached{why}; try again online, or give a "
        "folder with the files"
    )


def _check_size(
    repository: _Repository, sizes: dict[str, int], commit: str | None, say: Callable[[str], None]
) -> None:
    """Prints the size of the coming download. Raises HubError if the disk is too small."""
    hub = repository.hub
    place = {"repo_id": repository.name, "repo_type": repository.kind, "revision": commit}
    missing = [
        name for name in sizes if not isinstance(hub.try_to_load_from_cache(filename=name, **place), str)
    ]
    if not missing:
        return
    cache = Path(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE).absolute()
    disk = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    total, free = sum(sizes[name] for name in missing), shutil.disk_usage(disk).free
    what = f"{counted(len(missing), 'file')} of {size_text(total)} together"
    if total > free:
        raise HubError(
            f"{repository.source}: {what} do not fit into {cache}, where {size_text(free)} are free; free "
            "space, or set HF_HOME to a folder of a larger disk"
        )
    say(f"{repository.source}: downloading {what} to {cache}, where {size_text(free)} are free")


def _root(repository: _Repository, file: str) -> Path:
    """The cache folder of the version that holds a file."""
    try:
        with _refusals(repository):
            path = Path(repository.hub.hf_hub_download(**repository.asked, filename=file))
    except HubError:
        raise
    # Any error of httpx, requests or the system.
    except Exception as error:
        raise HubError(
            f"{repository.source}: {file} cannot be fetched ({one_line(error)}); try again later, or give a "
            "folder with the files"
        ) from None
    return path.parents[len(Path(file).parts) - 1]


@contextmanager
def _refusals(repository: _Repository) -> Iterator[None]:
    """Reports the hub's refusals in one line."""
    source, errors, what = repository.source, repository.errors, _WORDS[repository.kind]
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{source}: request access on its page, and log in with `hf auth login` afterwards"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(
            f"{source}: no revision {repository.revision} of this {what}; check the name"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise HubError(
            f"{source}: no such {what} on the hub, or a private one; check the name, or log in with "
            "`hf auth login`"
        ) from None
