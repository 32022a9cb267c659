"""Decides whether a manager has an engine of its own, or is a client of a server's."""

from __future__ import annotations

import os

from flexkv.common.config import CacheConfig, ModelConfig, Settings
from flexkv.common.config_keys import kind_of
from flexkv.common.errors import ConfigError
from flexkv.engine.engine import Engine
from flexkv.front.door import Door
from flexkv.server.engine_client import EngineClient
from flexkv.settings import PATH_VARIABLE, load_settings
from flexkv.tiers.backend import Backend

MODE_VARIABLE = "FLEXKV_SERVER_CLIENT_MODE"


def door_of(
    model: ModelConfig,
    cache: CacheConfig | None,
    settings: Settings | None,
    backend: Backend | None,
) -> Door:
    """Return an engine, or a client of one if `server_client_mode` is set.

    Without `settings`, the file and the environment are read if there is no `cache` either, or if
    `FLEXKV_CONFIG_PATH` or `FLEXKV_SERVER_CLIENT_MODE` is set. With a `backend`, the result is
    always an engine.

    Raises:
        ConfigError: an argument, the file or the environment breaks a rule.
    """
    _check("model", model, ModelConfig)
    if cache is not None:
        _check("cache", cache, CacheConfig)
    if settings is not None:
        _check("settings", settings, Settings)
    is_named = PATH_VARIABLE in os.environ or MODE_VARIABLE in os.environ
    if settings is None and (cache is None or (is_named and backend is None)):
        settings = load_settings()
    if cache is None:
        assert settings is not None
        cache = settings.cache_config
    if settings is None or not settings.server_client_mode or backend is not None:
        return Engine(model, cache, backend)
    return EngineClient(model, settings.model_copy(update={"cache_config": cache}))


def _check(field: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigError(field, kind_of(value), f"must be a {kind.__name__}")
