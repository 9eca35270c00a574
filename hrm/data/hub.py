"""Files of data sets on the Hugging Face hub, cached by its client; needs the extra `hub`."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrm.common.text import one_line
from hrm.data.format import DatasetError

PREFIX = "hub:"


def fetch(source: str, files: Sequence[str]) -> Path:
    """The folder with these files of a data set, downloaded if they are not in the cache.

    source: `hub:NAME`, such as hub:sapientinc/sudoku-extreme; files: paths in the data set. Raises
    DatasetError when huggingface_hub is missing, the hub cannot be reached, or has no such data set or file.
    """
    name = source.removeprefix(PREFIX)
    # The hub's form of names, which cannot lead out of the cache's folder.
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII):
        raise DatasetError(f"{source}: expected {PREFIX}OWNER/NAME, such as hub:sapientinc/sudoku-extreme")
    try:
        hub, errors = map(importlib.import_module, ("huggingface_hub", "huggingface_hub.utils"))
    except ImportError:
        raise DatasetError(
            f"{source}: the hub needs the package huggingface_hub; pip install -e '.[hub]', or give a folder "
            "with the files"
        ) from None
    roots = [_root(source, hub, errors, name, file) for file in files]
    if len(set(roots)) != 1:
        raise DatasetError(f"{source}: it changed during the download; run the command again")
    return roots[0]


def _root(source: str, hub: Any, errors: Any, name: str, file: str) -> Path:
    """The cache's folder of the data set version that holds a file."""
    try:
        path = Path(hub.hf_hub_download(repo_id=name, filename=file, repo_type="dataset"))
    # A subclass of EntryNotFoundError, so it comes first.
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise DatasetError(
            f"{source}: {file} is not in the cache and the hub cannot be reached; try again online, or give "
            "a folder with the files"
        ) from None
    except errors.EntryNotFoundError:
        raise DatasetError(f"{source}: no file {file} in this data set; expected one with it") from None
    except errors.GatedRepoError:
        raise DatasetError(
            f"{source}: access has to be asked for on its page; log in with `hf auth login` afterwards"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise DatasetError(
            f"{source}: no such data set on the hub, or a private one; check the name, or log in with "
            "`hf auth login`"
        ) from None
    # Any error of requests, httpx or the system.
    except Exception as error:
        raise DatasetError(
            f"{source}: {file} cannot be fetched ({one_line(error)}); try again later, or give a folder "
            "with the files"
        ) from None
    return path.parents[len(Path(file).parts) - 1]
