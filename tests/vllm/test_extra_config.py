"""Tests of FlexKV's keys in vLLM's `kv_connector_extra_config`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.common.config import Settings
from flexkv.common.errors import ConfigError
from flexkv.settings import load_settings

pytest.importorskip("vllm")

from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from flexkv.integration.vllm.extra_config import with_extra
from flexkv.integration.vllm.setup import setup_of
from flexkv.server.launch import told_of

from .caches import full, group, state, window


def settled(tmp_path: Path, extra: Any, file: Any = None, **environment: str) -> Settings:
    """Return an engine's settings, given the extra keys, a file and environment variables."""
    if file is not None:
        path = tmp_path / "flexkv.json"
        path.write_text(json.dumps(file))
        environment["FLEXKV_CONFIG_PATH"] = str(path)
    return with_extra(load_settings(environment), SimpleNamespace(kv_connector_extra_config=extra))


@pytest.mark.parametrize(
    "extra",
    [
        {"log_level": "warning", "logging_prefix": "X", "ssd_cache_dir": "/c", "num_cpu_blocks": 7},
        {"log_level": "warning", "logging_prefix": "X",
         "cache_config": {"ssd_cache_dir": "/c", "num_cpu_blocks": 7}},
    ],
    ids=["flat", "nested"],
)  # fmt: skip
def test_it_wins_over_the_file_and_the_environment(tmp_path: Path, extra: dict[str, Any]) -> None:
    """The extra keys win over file and environment, even in other units."""
    file = {
        "log_level": "error", "server_answer_ms": 77,
        "cache_config": {"cpu_cache_gb": 3, "ssd_cache_dir": "/b;/d", "key_secret": "of the file"},
    }  # fmt: skip
    got = settled(tmp_path, extra, file, FLEXKV_NUM_SSD_BLOCKS="99", FLEXKV_LOG_LEVEL="debug")
    assert (got.log_level, got.logging_prefix, got.server_answer_ms) == ("warning", "X", 77)
    cache = got.cache_config
    assert (cache.num_cpu_blocks, cache.num_ssd_blocks) == (7, 99)
    assert cache.key_secret.get_secret_value() == "of the file"
    assert [str(each) for each in cache.ssd_cache_dir] in (["/c"], list("/c"))


@pytest.mark.parametrize("extra", [None, {}, {"weights_id": "llama"}, {"mixed_local_hits": False}])
def test_without_keys_the_other_sources_hold(tmp_path: Path, extra: Any) -> None:
    """Without keys of FlexKV's own the other sources hold; `weights_id` is not such a key."""
    file = {"log_level": "error", "cache_config": {"num_cpu_blocks": 5, "ssd_cache_dir": "/b"}}
    with_it = settled(tmp_path, extra, file)
    assert with_it == load_settings({"FLEXKV_CONFIG_PATH": str(tmp_path / "flexkv.json")})


@pytest.mark.parametrize(
    ("extra", "field", "words"),
    [
        ({"cpu_cache_bg": 3}, "cpu_cache_bg", "cpu_cache_gb"),
        ({"weight_id": "llama"}, "weight_id", "weights_id"),
        ({"weights-id": "llama"}, "weights-id", "weights_id"),
        ({"mixed_local_hit": True}, "mixed_local_hit", "mixed_local_hits"),
        ({"cache_config": {"num_cpu_blokcs": 3}}, "num_cpu_blokcs", "num_cpu_blocks"),
        ({"server_answer_ms": "soon"}, "server_answer_ms", "integer"),
        ({"cpu_cache_gb": -1}, "cpu_cache_gb", "greater"),
        ({"cache_config": 7}, "cache_config", "object"),
        ([1], "kv_connector_extra_config", "object"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_name(
    tmp_path: Path, extra: Any, field: str, words: str
) -> None:
    """The error for a wrong key names its place, and the nearest known key."""
    with pytest.raises(ConfigError, match=words) as caught:
        settled(tmp_path, extra)
    assert caught.value.field.startswith("kv_connector_extra_config")
    assert caught.value.field.endswith(field)


@pytest.mark.parametrize("told", [True, False, None])
def test_users_may_say_whether_loads_continue_local_hits(
    configured: Any, told: bool | None
) -> None:
    """The key overrides what is known of the model's KV groups; only true and false are values."""
    config = copy.deepcopy(configured)
    extra = {} if told is None else {"mixed_local_hits": told}
    config.kv_transfer_config.kv_connector_extra_config = extra
    gdn = state(mamba_type=MambaAttentionBackendEnum.GDN_ATTN)
    for spec, usual in ((gdn, False), (window(), True)):
        caches = SimpleNamespace(kv_cache_groups=[group(full(), "a"), group(spec, "b")])
        groups = setup_of(config, kv_cache_config=caches).groups
        assert groups is not None
        assert groups.mixes == (usual if told is None else told)
    config.kv_transfer_config.kv_connector_extra_config = {"mixed_local_hits": "maybe"}
    with pytest.raises(ConfigError, match="mixed_local_hits='maybe': must be true or false"):
        setup_of(config)


def test_a_secret_in_it_is_never_quoted(tmp_path: Path) -> None:
    """An error quotes no secret, neither of the extra keys nor of another source."""
    file = {"cache_config": {"key_secret": "hush-hush-hush"}}
    for extra in ({"key_secret": ["hush-hush-hush"]}, {"cpu_cache_gb": "much"}):
        with pytest.raises(ConfigError) as caught:
            settled(tmp_path, extra, file)
        assert "hush" not in str(caught.value)
        assert caught.value.__context__ is None


def test_it_reaches_the_connector_and_the_server(configured: Any) -> None:
    """The connector and the server get the extra keys, level and prefix of log lines included."""
    config = copy.deepcopy(configured)
    config.kv_transfer_config.kv_connector_extra_config = {
        "log_level": "error", "logging_prefix": "node 7", "num_cpu_blocks": 77, "weights_id": "w",
    }  # fmt: skip
    settings = setup_of(config).settings
    assert (settings.log_level, settings.logging_prefix) == ("error", "node 7")
    told = told_of(settings)
    assert (told["log_level"], told["logging_prefix"]) == ("error", "node 7")
    assert told["cache_config"]["num_cpu_blocks"] == 77
    assert setup_of(config).model != setup_of(configured).model  # the weights have a name


@pytest.mark.parametrize(("instance", "rank"), [(0, 0), (0, 2), (3, 0), (3, 2)])
def test_each_rank_of_data_parallelism_is_an_instance(
    configured: Any, instance: int, rank: int
) -> None:
    """Each rank of data parallelism is an instance of its own; only the first launches a server."""
    config = copy.deepcopy(configured)
    config.kv_transfer_config.kv_connector_extra_config = {
        "instance_id": instance, "server_launch_mode": "embedded",
    }  # fmt: skip
    config.parallel_config.data_parallel_rank = rank
    if hasattr(config.parallel_config, "data_parallel_index"):
        config.parallel_config.data_parallel_index = rank
    setup = setup_of(config)
    assert (setup.instance >> 16, setup.instance & 0xFFFF) == (instance, rank)
    assert setup.launches == (instance == rank == 0)


@pytest.mark.parametrize(
    ("told", "dtype"),
    [("auto", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"),
     ("fp8", "uint8"), ("fp8_e5m2", "uint8")],
)  # fmt: skip
def test_a_quantised_cache_has_elements_of_a_byte(configured: Any, told: str, dtype: str) -> None:
    """A quantised cache has elements of one byte; others have their own dtype or the model's."""
    config = copy.deepcopy(configured)
    config.cache_config.cache_dtype = told
    assert setup_of(config).model.dtype == dtype


def test_the_keys_of_sharing_are_known(tmp_path: Path) -> None:
    """Nodes that vLLM starts share blocks by the keys that a file has, too."""
    peers = {
        "enable_p2p_cpu": True, "enable_p2p_ssd": True, "redis_host": "10.0.0.9",
        "redis_port": 6380, "local_ip": "10.0.0.2", "node_ttl_seconds": 5.0,
        "mooncake_config_path": "/etc/mooncake.json",
    }  # fmt: skip
    more = {"redis_password": "of redis", "num_ssd_blocks": 8, "ssd_cache_dir": "/d"}
    cache = settled(tmp_path, {**peers, **more}).cache_config
    assert {key: getattr(cache, key) for key in peers} == peers
    assert cache.redis_password.get_secret_value() == "of redis"
