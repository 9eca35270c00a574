"""A stand-in for the package wandb that records its calls."""

from types import ModuleType, SimpleNamespace
from typing import Any


class FakeWandb(ModuleType):
    """The part of wandb that the tracker uses; records the calls."""

    def __init__(self, logged_in: bool) -> None:
        super().__init__("wandb")
        self.logged_in, self.fails, self.finished = logged_in, "", 0
        self.calls: list[dict[str, Any]] = []
        self.logged: list[tuple[int, Any]] = []

    def login(self, **options: Any) -> bool:
        # without this it would prompt
        assert options["prompt"] is False
        return self.logged_in

    def init(self, **options: Any) -> Any:
        if self.fails:
            raise RuntimeError(self.fails)
        self.calls.append(options)
        return SimpleNamespace(
            log=lambda metrics, step: self.logged.append((step, metrics)), finish=self._finish
        )

    def _finish(self) -> None:
        self.finished += 1
