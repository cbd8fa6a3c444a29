"""Runs inside a run: what a chat model starts stands below it in the trace, with its callbacks and tags.

The run manager of a language model makes no child managers, so one is built here from what it would hand down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler, CallbackManager
from langchain_core.callbacks.manager import BaseRunManager
from langchain_core.language_models.base import LangSmithParams
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.utils.uuid import uuid7

_ABOUT_THE_MODEL = frozenset(LangSmithParams.__annotations__) | {"ls_integration"}
"""Metadata that describes a chat model and would be untrue of a retriever."""


@dataclass(frozen=True)
class ParentRun:
    """The run under which others are started."""

    run_id: UUID
    handlers: Sequence[BaseCallbackHandler]
    tags: Sequence[str]
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, manager: BaseRunManager) -> ParentRun:
        return cls(manager.run_id, manager.inheritable_handlers, manager.inheritable_tags, manager.inheritable_metadata)

    def child_config(self) -> RunnableConfig:
        manager = CallbackManager(handlers=[], parent_run_id=self.run_id)
        manager.set_handlers(list(self.handlers))
        manager.add_tags(list(self.tags))
        manager.add_metadata({key: value for key, value in self.metadata.items() if key not in _ABOUT_THE_MODEL})
        return RunnableConfig(callbacks=manager)


def announced(config: RunnableConfig | None) -> tuple[RunnableConfig, ParentRun]:
    """A config whose run is known before it starts: `BaseChatModel.stream` does not tell the model which run it is."""
    config = ensure_config(config)
    run_id = config.get("run_id") or uuid7()
    manager = CallbackManager.configure(
        config.get("callbacks"), None, False, config.get("tags"), None, config.get("metadata")
    )
    parent = ParentRun(run_id, manager.inheritable_handlers, manager.inheritable_tags, manager.inheritable_metadata)
    return {**config, "callbacks": manager, "run_id": run_id}, parent
