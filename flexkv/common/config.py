"""Configuration as users import it, and the settings of a whole process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from flexkv.common.config_cache import CacheConfig
from flexkv.common.config_keys import (
    ConfigModel,
    announce,
    check_no_key_swallowed,
    current_names,
    facts_of,
    key,
    kind_of,
    shown,
)
from flexkv.common.config_layers import RANKS_MAX, LayerGroup
from flexkv.common.config_model import ModelConfig
from flexkv.common.config_sizes import GB, MB, SIZE_PAIRS
from flexkv.common.errors import ConfigError
from flexkv.common.space import CacheSizes

__all__ = [
    "GB",
    "MB",
    "CacheConfig",
    "CacheSizes",
    "LayerGroup",
    "ModelConfig",
    "Settings",
    "overruled",
    "settings_of",
    "variable_keys",
]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


LogLevel = Annotated[
    Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)
]


class Settings(ConfigModel):
    """Settings of a process, from its file and environment; `cache_config` has the cache's keys."""

    enable_flexkv: bool = key(
        True, "Whether an engine's connector uses FlexKV at all.", variables=("ENABLE_FLEXKV",)
    )
    server_recv_port: str = key(
        "own",
        "Unix socket at which device agents and clients find the server: `ipc:///path`, in a"
        " directory to which no other user may write. `own` stands for a directory of this user"
        " alone: `flexkv` in `$XDG_RUNTIME_DIR` or `/run/user/UID`, else `/tmp/flexkv-UID`.",
    )
    server_answer_ms: int = key(
        250,
        "How long an engine's scheduler waits for the server before it continues without it for"
        " a while.",
        unit="ms",
        ge=1,
        le=3_600_000,
    )
    match_wait_ms: float = key(
        0.4,
        "How long one step of the scheduler waits in total for the server's answers about new"
        " prompts; a prompt without an answer by then is tried again in the next step.",
        unit="ms",
        ge=0,
        le=3_600_000,
    )
    server_client_mode: bool = key(
        False,
        "Whether a `KVManager` uses the engine of a server in another process, at"
        " `server_recv_port`, instead of one of its own. Connectors always do.",
    )
    server_launch_mode: Literal["embedded", "external"] = key(
        "embedded", "Who runs the server: the first instance, or `flexkv serve`."
    )
    instance_num: int = key(1, "Engine instances that share one server.", ge=1, le=RANKS_MAX)
    instance_id: int = key(0, "Number of this instance among them, from 0.", ge=0, lt=RANKS_MAX)
    enable_metrics: bool = key(
        False, "Serve Prometheus metrics in the server; in code, use flexkv.metrics.MetricsServer."
    )
    py_metrics_port: int = key(8080, "Port at which the metrics are served.", ge=1, le=65535)
    metrics_host: str = key(
        "127.0.0.1",
        "Address at which the metrics are served; `0.0.0.0` lets other machines, such as the"
        " Prometheus of a cluster, scrape them.",
        min_length=1,
    )
    log_level: LogLevel = key("info", "Lowest severity that the library and the server log.")
    logging_prefix: str = key("", "Prefix of every log line.")
    enable_layerwise_transfer: bool = key(
        False,
        "Let vLLM's steps load what is in host memory, and use each layer as soon as it is there."
        " The other requests of a step wait, too. Only with FlexKV's own connector.",
    )
    sync_get: bool = key(
        False,
        "Load during the engine's step instead of in parallel to it.",
        part="a connector that loads in the step",
        built=(False,),
    )
    dynamo_use_flexkv: bool = key(
        False, "Set by Dynamo when it runs engines with FlexKV.", variables=("DYNAMO_USE_FLEXKV",)
    )
    cache_config: CacheConfig = Field(
        default_factory=CacheConfig,
        description="The cache's own keys; they may also be at the top level.",
    )

    def require_built(self) -> None:
        """Check that every part that these settings and the cache's keys ask for is built.

        Raises:
            ConfigError: a key enables a part that is not built; the error names both.
        """
        super().require_built()
        self.cache_config.require_built()


def settings_of(file: Mapping[str, Any], environment: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings from a file's content and from the environment; the file wins.

    Args:
        file: keys and values, flat, or with the cache's keys nested under `cache_config`.
        environment: the same keys, flat.

    Raises:
        ConfigError: a key is unknown, has a wrong value, or has two values.
    """
    models = (Settings, CacheConfig)
    nested = file.get("cache_config") or {}
    if not isinstance(nested, Mapping):
        raise ConfigError("cache_config", kind_of(nested), "must be an object of keys")
    for name in (*file, *nested):
        if not isinstance(name, str):
            raise ConfigError("key", kind_of(name), "must be a string")
    flat = {name: value for name, value in file.items() if name != "cache_config"}
    outer, outer_renames = current_names(flat, models)
    inner, inner_renames = current_names(nested, (CacheConfig,))
    for name in outer.keys() & inner.keys():
        if outer[name] != inner[name]:
            why = "is also in cache_config, with another value: give it once"
            raise ConfigError(name, shown(name, outer[name], models), why)
    announce({**outer_renames, **inner_renames})
    chosen = {**outer, **inner}
    check_no_key_swallowed(chosen, models)
    merged = {**(environment or {}), **chosen}
    for name, _ in overruled(environment or {}, chosen):
        del merged[name]
    own = {name: merged.pop(name) for name in list(merged) if name in Settings.model_fields}
    return Settings(**own, cache_config=CacheConfig(**merged))


def overruled(below: Mapping[str, Any], above: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the sizes of one source that the winning source gives in the other unit.

    Args:
        below: keys and values of the source that loses.
        above: keys and values of the source that wins, under their current names.

    Yields:
        The key that is ignored, and the key that replaces it.
    """
    for pair in SIZE_PAIRS:
        for name, rival in (pair, pair[::-1]):
            if name in below and name not in above and above.get(rival) is not None:
                yield name, rival


def variable_keys() -> dict[str, str]:
    """Return the key that each environment variable sets; some variables set retired names."""
    variables: dict[str, str] = {}
    for model in (Settings, CacheConfig):
        for name, field in model.model_fields.items():
            if name == "cache_config":
                continue
            facts = facts_of(field)
            for variable in facts.variables or (f"FLEXKV_{name.upper()}",):
                variables[variable] = name
            for old in facts.old:
                variables[f"FLEXKV_{old.upper()}"] = old
    return variables
