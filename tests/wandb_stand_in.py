"""A module in the place of `wandb`, which notes what it is told."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


class WandbStandIn(ModuleType):
    """Put it into `sys.modules`.

    Attributes:
        arguments: of `init`.
        values: (step, what was logged).
        finished: whether the run was closed.
    """

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.arguments: dict[str, Any] = {}
        self.values: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def init(
        self,
        project: str | None = None,
        name: str | None = None,
        dir: str | None = None,
        config: dict[str, Any] | None = None,
        settings: Any = None,
        tags: list[str] | None = None,
    ) -> WandbStandIn:
        self.arguments = {"project": project, "name": name, "dir": dir, "config": config, "tags": tags}
        self.arguments["key"] = settings and settings.api_key
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.values.append((step, values))

    def finish(self) -> None:
        self.finished = True

    def Settings(self, api_key: str) -> SimpleNamespace:
        return SimpleNamespace(api_key=api_key)

    def Image(self, pixels: Any) -> Any:
        return pixels.shape
