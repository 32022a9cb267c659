"""FlexKV's keys in vLLM's own configuration: `kv_connector_extra_config`.

    vllm serve … --kv-transfer-config '{"kv_connector": "FlexKVConnector", …,
        "kv_connector_extra_config": {"cpu_cache_gb": 64, "ssd_cache_dir": "/data/flexkv"}}'

It accepts every key of the configuration file, flat or under `cache_config`, and overrides the file
and the environment. Two keys are accepted only here: `weights_id` (see `identity.py`), and
`mixed_local_hits`, whether a load may continue a prefix that the device has (see `groups.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from flexkv.common.config import CacheConfig, Settings, settings_of
from flexkv.common.config_keys import kind_of, old_names
from flexkv.common.errors import ConfigError
from flexkv.integration.vllm.identity import WEIGHTS_ID

FIELD = "kv_connector_extra_config"
MIXED = "mixed_local_hits"
ONLY_HERE = (WEIGHTS_ID, MIXED)
ALIKE = 0.75
"""How similar an unknown key must be to one of these to be taken for it."""


def with_extra(settings: Settings, transfer: Any) -> Settings:
    """Return the settings of a process, overridden by those in vLLM's configuration.

    Args:
        settings: those of the file and the environment.
        transfer: vLLM's `KVTransferConfig`.

    Raises:
        ConfigError: a key is unknown, or its value breaks a rule; the error names the nearest
            known key.
    """
    told = {name: value for name, value in _told(transfer).items() if name not in ONLY_HERE}
    if not told:
        return settings
    _check_spelling(told)
    try:
        return settings_of(told, {**_given(settings), **_given(settings.cache_config)})
    except ConfigError as error:
        if error.field in (*told, *_nested(told), "key"):
            fault = ConfigError(f"{FIELD}.{error.field}", error.value, error.why)
        else:
            fault = error
    raise fault  # raised here, so that no context holds the values


def mixed_local_hits(transfer: Any) -> bool | None:
    """Return whether loads may continue what the device has; None if the user says nothing.

    Raises:
        ConfigError: it is neither true nor false.
    """
    told = _told(transfer).get(MIXED)
    if told is not None and not isinstance(told, bool):
        raise ConfigError(f"{FIELD}.{MIXED}", told, "must be true or false")
    return told


def _told(transfer: Any) -> Mapping[Any, Any]:
    extra = getattr(transfer, FIELD, None) or {}
    if not isinstance(extra, Mapping):
        raise ConfigError(FIELD, kind_of(extra), "must be a JSON object")
    return extra


def _check_spelling(told: Mapping[Any, Any]) -> None:
    """Raise ConfigError for a probable misspelling of a key that is accepted only here."""
    models = (Settings, CacheConfig)
    known = {*old_names(models), *(name for model in models for name in model.model_fields)}
    for name in told:
        is_unknown = isinstance(name, str) and name not in known
        nearest = get_close_matches(name, ONLY_HERE, n=1, cutoff=ALIKE) if is_unknown else []
        if nearest:
            why = f"unknown key; the nearest known one is {nearest[0]}"
            raise ConfigError(f"{FIELD}.{name}", kind_of(told[name]), why)


def _nested(told: Mapping[Any, Any]) -> Mapping[Any, Any]:
    nested = told.get("cache_config")
    return nested if isinstance(nested, Mapping) else {}


def _given(config: BaseModel) -> dict[str, Any]:
    """Return the keys that were given, under their current names."""
    return {
        name: getattr(config, name)
        for name in type(config).model_fields
        if name in config.model_fields_set and name != "cache_config"
    }
