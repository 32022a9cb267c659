"""Managers whose engine is in a server's process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexkv.common.config import ModelConfig
from flexkv.kvmanager import KVManager

from .caches import MODEL
from .forked import forked_server
from .serving import settings_in


@contextmanager
def started_client(folder: Path, model: ModelConfig = MODEL, **changes: Any) -> Iterator[KVManager]:
    """Yield a started client of a server of its own, and check that both end well."""
    settings = settings_in(folder, server_client_mode=True, **changes)
    server = forked_server(settings, model)
    manager = KVManager(model, settings=settings)
    manager.start()
    try:
        yield manager
    finally:
        manager.shutdown()
        server.close()
    assert server.exit_status == 0
