"""Files of data sets on the Hugging Face hub, kept in its cache; needs the extra `hub`."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrm.data.format import DatasetError

PREFIX = "hub:"


def fetch(source: str, files: Sequence[str]) -> Path:
    """Folder that holds these files of a data set, downloaded where they are not in the cache yet.

    source: `hub:NAME`, such as hub:sapientinc/sudoku-extreme; files: paths in the data set. Raises
    DatasetError when huggingface_hub is missing, the hub cannot be reached, or has no such data set or file.
    """
    name = source.removeprefix(PREFIX)
    # As the hub has them; nothing that a cache of folders could take for a way out.
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
        raise DatasetError(f"{source}: it was changed while it was read; run the command again")
    return roots[0]


def _root(source: str, hub: Any, errors: Any, name: str, file: str) -> Path:
    """The folder of the version of the data set that a file was fetched from."""
    try:
        path = Path(hub.hf_hub_download(repo_id=name, filename=file, repo_type="dataset"))
    # Of the kind that the next one is of, so it comes first.
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
    # Whatever is between here and there: requests, httpx, the system.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DatasetError(
            f"{source}: {file} cannot be fetched ({reason}); try again later, or give a folder with the files"
        ) from None
    return path.parents[len(Path(file).parts) - 1]
