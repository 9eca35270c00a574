"""A fake huggingface_hub without a network: it serves folders, and has a cache like the real package."""

import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

COMMIT = "abc"
ERRORS = {
    "RepositoryNotFoundError": Exception,
    "RevisionNotFoundError": Exception,
    "HFValidationError": Exception,
    "OfflineModeIsEnabled": ConnectionError,
}


class FakeHub(ModuleType):
    """A hub with the repositories `served/OWNER/NAME`; raises `error` if it is set.

    files: additional names in the listing. asked: kind, repository, revision and name of each download.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.served, self.cache = folder / "served", folder / "cache"
        self.error: Exception | None = None
        self.files: list[str] = []
        self.asked: list[tuple[str, str, str | None, str]] = []
        self.utils = ModuleType("huggingface_hub.utils")
        for name, base in ERRORS.items():
            setattr(self.utils, name, type(name, (base,), {}))
        # As in the real package, GatedRepoError is a RepositoryNotFoundError.
        self.utils.GatedRepoError = type("GatedRepoError", (self.utils.RepositoryNotFoundError,), {})  # type: ignore[attr-defined]
        self.constants = ModuleType("huggingface_hub.constants")
        self.constants.HF_HUB_CACHE = str(self.cache)  # type: ignore[attr-defined]

    def modules(self) -> dict[str, ModuleType]:
        return {part.__name__: part for part in (self, self.utils, self.constants)}

    def HfApi(self) -> Any:
        return SimpleNamespace(repo_info=self._info)

    def _info(self, *, repo_id: str, repo_type: str, revision: str | None, files_metadata: bool) -> Any:
        if self.error is not None:
            raise self.error
        folder = self.served / repo_id
        if not folder.is_dir():
            raise self.utils.RepositoryNotFoundError
        if revision not in (None, "main", COMMIT):
            raise self.utils.RevisionNotFoundError
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file()
        }
        sizes |= dict.fromkeys(self.files, 1)
        found = [
            SimpleNamespace(rfilename=name, size=size if files_metadata else None)
            for name, size in sizes.items()
        ]
        return SimpleNamespace(siblings=found, sha=COMMIT)

    def _snapshot(self, repo_id: str, repo_type: str) -> Path:
        return self.cache / f"{repo_type}s--{repo_id.replace('/', '--')}" / "snapshots" / COMMIT

    def try_to_load_from_cache(
        self, *, repo_id: str, filename: str, repo_type: str, revision: str
    ) -> str | None:
        path = self._snapshot(repo_id, repo_type) / filename
        return str(path) if path.exists() and revision == COMMIT else None

    def hf_hub_download(self, *, repo_id: str, filename: str, repo_type: str, revision: str | None) -> str:
        self.asked.append((repo_type, repo_id, revision, filename))
        path = self._snapshot(repo_id, repo_type) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.served / repo_id / filename, path)
        return str(path)

    def snapshot_download(
        self,
        *,
        repo_id: str,
        repo_type: str,
        revision: str | None,
        local_files_only: bool,
        allow_patterns: list[str],
    ) -> str:
        folder = self._snapshot(repo_id, repo_type)
        if not (folder.is_dir() and local_files_only and not allow_patterns):
            raise FileNotFoundError
        return str(folder)
