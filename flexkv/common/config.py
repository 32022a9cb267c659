"""The configuration: of the model, of the cache, and of the process that runs it.

Frozen pydantic models whose every fault is a `ConfigError` that names the field, the value and the
rule. A key of a part that does not exist yet is accepted and checked; `require_built` refuses it
when it is enabled. Files and the environment are read in `flexkv.settings`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BeforeValidator, Field
from typing_extensions import Annotated

from flexkv.common.config_cache import GB, MB, CacheConfig, CacheSizes
from flexkv.common.config_keys import ConfigModel, RetiredKeyWarning, key
from flexkv.common.config_model import LayerGroup, ModelConfig

__all__ = [
    "GB",
    "MB",
    "CacheConfig",
    "CacheSizes",
    "LayerGroup",
    "ModelConfig",
    "RetiredKeyWarning",
    "Settings",
]


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)
]


class Settings(ConfigModel):
    """A whole configuration file: the process's keys, and the cache's."""

    enable_flexkv: bool = key(
        True, "Let the inference engine use FlexKV.", variables=("ENABLE_FLEXKV",)
    )
    server_recv_port: str = key(
        "ipc:///tmp/flexkv_server", "Address at which a server takes requests.",
        pattern=r"^(ipc|tcp)://.+",
    )
    server_client_mode: bool = key(
        False, "Run the cache in a process of its own, with engines as its clients.",
        part="the server", built=(False,),
    )
    server_launch_mode: Literal["embedded", "external"] = key(
        "embedded", "Who starts the server: the first engine, or somebody else."
    )
    num_log_interval_requests: int = key(
        200, "Requests between two summary lines in the log; 0 = none.", unit="requests", ge=0
    )
    instance_num: int = key(
        1, "Engine instances that share one cache.", ge=1,
        part="the server for several instances", built=(1,),
    )
    instance_id: int = key(0, "Which of the instances this one is.", ge=0)
    enable_metrics: bool = key(
        False, "Serve metrics for Prometheus.", part="the metrics endpoint", built=(False,)
    )
    py_metrics_port: int = key(8080, "Port that metrics are served at.", ge=1, le=65535)
    log_level: LogLevel = key("INFO", "Least severe events that are logged.")
    logging_prefix: str = key("FLEXKV", "First word of every log line.")
    enable_layerwise_transfer: bool = key(
        False, "Let the engine start on a layer before the next ones have arrived.",
        part="layer-wise transfer", built=(False,),
    )
    sync_get: bool = key(
        False, "Make the engine wait for its gets.",
        part="the engine integration", built=(False,),
    )
    dynamo_use_flexkv: bool = key(
        False, "Report blocks to Dynamo's router.", variables=("DYNAMO_USE_FLEXKV",),
        part="the Dynamo integration", built=(False,),
    )
    cache_config: CacheConfig = Field(
        default_factory=CacheConfig, description="The cache's own keys."
    )

    def require_built(self) -> None:
        """Return if every part of the system that any key asks for exists.

        Raises:
            ConfigError: a key enables a part that is not built; the error names both.
        """
        super().require_built()
        self.cache_config.require_built()
