"""Commands of an operator to a running server: `flexkv trace start`, `flexkv server …`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import msgspec

from flexkv.common.errors import ConfigError
from flexkv.engine.engine import Engine
from flexkv.index.keys import Namespace
from flexkv.server.fleet import FleetPort


class Control:
    """The commands that an operator may run on an engine."""

    def __init__(self, engine: Engine, fleet: FleetPort) -> None:
        self._engine, self._fleet = engine, fleet
        self._verbs: dict[str, Callable[..., Any]] = {
            "trace_start": self._trace_start,
            "trace_stop": self._trace_stop,
            "status": self._status,
            "clear": self._clear,
            "flush": self._flush,
            "cluster_reset": self._engine.reset_cluster,
        }

    async def perform(self, verb: str, arguments: dict[str, Any]) -> Any:
        """Run a command, and return its result.

        Raises:
            ConfigError: there is no such command, or its arguments are not valid.
            FlexKVError: the command failed.
        """
        work = self._verbs.get(verb)
        if work is None:
            raise ConfigError("command", verb, f"must be one of {', '.join(self._verbs)}")
        try:
            given = work(**arguments)
            return await given if inspect.isawaitable(given) else given
        except (TypeError, ValueError, OSError) as error:
            raise ConfigError("arguments", arguments, str(error)) from error

    def _trace_start(self, path: str | None = None, tokens: bool | None = None) -> str | None:
        if not isinstance(path, str | None) or not isinstance(tokens, bool | None):
            raise TypeError("path must be a string, and tokens true or false")
        self._engine.tracing.start(path, tokens)
        return self._engine.tracing.path

    def _trace_stop(self) -> str | None:
        return self._engine.tracing.stop()

    async def _clear(self, tier: str | None = None, namespace: Namespace = None) -> int:
        names = {each.label: each for each in self._engine.residency.tiers}
        if tier is not None and tier not in names:
            raise ConfigError("tier", tier, f"must be one of {', '.join(names)}")
        which = None if tier is None else names[tier]
        return await self._engine.retention.clear_durably(which, namespace)

    async def _flush(self) -> Any:
        return msgspec.to_builtins(await self._engine.flush())

    def _status(self) -> Any:
        return {
            "pid": os.getpid(),
            "instances": {
                str(number): {
                    "ranks": sorted(instance.ports),
                    "ready": instance.epoch is not None,
                    "blocks": instance.num_blocks,
                    "client": instance.client is not None,
                    "stuck": instance.stuck,
                }
                for number, instance in self._fleet.instances.items()
            },
            "statistics": msgspec.to_builtins(self._engine.statistics()),
        }
