"""The sources of configuration (files, environment, code), and what each of them may not say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError
from structlog.testing import capture_logs

from flexkv.common.config import CacheConfig, LayerGroup, ModelConfig, Settings, settings_of
from flexkv.common.config_keys import RetiredKeyWarning
from flexkv.common.config_sizes import SIZE_PAIRS
from flexkv.common.errors import ConfigError
from flexkv.settings import FILE_BYTES_MAX, load_file, load_settings

MODEL: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_size": 8, "dtype": "float16"}
GROUP: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_size": 8}
BASES: dict[type[BaseModel], dict[str, Any]] = {
    ModelConfig: MODEL, CacheConfig: {}, Settings: {}, LayerGroup: GROUP,
}  # fmt: skip


def _kinds(model: type[BaseModel], name: str) -> set[type]:
    annotation = model.model_fields[name].annotation
    union = isinstance(annotation, types.UnionType)
    return set(get_args(annotation)) if union else {annotation}  # type: ignore[arg-type]


NUMBERS = [
    (model, name)
    for model in BASES
    for name in model.model_fields
    if _kinds(model, name) & {int, float}
]
"""Every numeric key of every model."""
WRONG = [
    10**30, -(10**30), 1e30, -2, -1e9, math.nan, math.inf, -math.inf, "nan", "inf", "1e400", True,
    False, "9" * 5000, "x" * 10**6, "", [], {}, np.float64("nan"), np.int64(-5), 5j, b"5", object(),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name"), NUMBERS, ids=lambda each: getattr(each, "__name__", each)
)
@pytest.mark.filterwarnings("ignore::flexkv.common.config_keys.RetiredKeyWarning")
def test_every_number_has_bounds(model: type[BaseModel], name: str) -> None:
    """A numeric key refuses, by its name, what is out of bounds, not finite, or not a number."""
    for wrong in WRONG:
        with pytest.raises((ConfigError, ValueError)) as caught:
            model(**{**BASES[model], name: wrong})
        if isinstance(caught.value, ConfigError):
            assert caught.value.field == name
            assert len(str(caught.value)) < 500
        else:  # pydantic's own error: a group is otherwise checked as part of a model
            assert name in str(caught.value)


def _outcome(model: type[BaseModel], values: dict[str, Any], name: str) -> object:
    """Return a key's value with its type, or the error if the value 2 breaks a rule."""
    try:
        found = getattr(model(**values), name)
    except ConfigError as error:
        return str(error)
    except ValidationError as error:  # of a group, which is otherwise checked as part of a model
        return [each["msg"] for each in error.errors()]
    return type(found), found


@pytest.mark.parametrize(
    ("model", "name"), NUMBERS, ids=lambda each: getattr(each, "__name__", each)
)
@pytest.mark.filterwarnings("ignore::flexkv.common.config_keys.RetiredKeyWarning")
def test_numbers_of_other_libraries_are_numbers(model: type[BaseModel], name: str) -> None:
    """A numpy scalar is accepted as Python's own number."""
    for number in (np.int64(2), np.int32(2), np.uint8(2), np.array(2)):
        values = {**BASES[model], name: number}
        assert _outcome(model, values, name) == _outcome(model, {**values, name: 2}, name)


def test_bounds_hold_for_what_keys_mean_together() -> None:
    """Values that only together are too large are refused, such as a block beyond any machine."""
    large = ModelConfig(num_layers=16384, num_kv_heads=65536, head_size=65536, dtype="float64")
    with pytest.raises(ConfigError, match=r"tokens_per_block=65536: a block of this model"):
        CacheConfig(tokens_per_block=65536).sized(large)
    tiny = ModelConfig(num_layers=1, num_kv_heads=1, head_size=1, dtype="int8")
    with pytest.raises(ConfigError, match=r"cpu_cache_gb=1048576.0: would hold .* blocks"):
        CacheConfig(cpu_cache_gb=2**20).sized(tiny)
    with pytest.raises(ConfigError, match="hugepage_size_bytes=5000: must be a power of two"):
        CacheConfig(hugepage_size_bytes=5000)
    with pytest.raises(ConfigError, match="max_file_size_gb"):
        CacheConfig(max_file_size_gb=1e30)


@pytest.mark.parametrize(
    ("model", "values", "field"),
    [
        (ModelConfig, {**MODEL, "model_id": "\ud800"}, "model_id"),
        (ModelConfig, {**MODEL, "model_id": "a\0b"}, "model_id"),
        (ModelConfig, {**MODEL, "model_id": "x" * 10**6}, "model_id"),
        (ModelConfig, {**MODEL, "dtype": "x" * 10**6}, "dtype"),
        (ModelConfig, {**MODEL, "layer_groups": [{**GROUP, "layer_indices": [True, 1]}]},
         "layer_groups[0].layer_indices[0]"),
        (ModelConfig, {**MODEL, "layer_groups": [{**GROUP, "layer_indices": [10**30, 1]}]},
         "layer_groups[0].layer_indices[0]"),
        (ModelConfig, {**MODEL, "layer_groups": [{**GROUP, "head_size": True}]},
         "layer_groups[0].head_size"),
        (CacheConfig, {"ssd_cache_dir": "/a\0b"}, "ssd_cache_dir"),
        (CacheConfig, {"ssd_cache_dir": ["/a", "/b\0"]}, "ssd_cache_dir"),
        (CacheConfig, {"key_secret": "\ud800"}, "key_secret"),
        (CacheConfig, {"enable_ssd": 7}, "enable_ssd"),
        (CacheConfig, {"eviction_policy": ["lru"]}, "eviction_policy"),
        (Settings, {"server_recv_port": 5}, "server_recv_port"),
        (Settings, {"log_level": "loud"}, "log_level"),
        (Settings, {"log_level": 10}, "log_level"),
    ],
)  # fmt: skip
def test_odd_texts_are_refused_by_name(
    model: type[BaseModel], values: dict[str, Any], field: str
) -> None:
    """Text that no name or path can have, overlong text and wrong types are refused by name."""
    with pytest.raises(ConfigError) as caught:
        model(**values)
    assert caught.value.field == field
    assert len(str(caught.value)) < 500


# -- one size in two units ----------------------------------------------------------------------


@pytest.mark.parametrize("pair", SIZE_PAIRS)
@pytest.mark.filterwarnings("ignore::flexkv.common.config_keys.RetiredKeyWarning")
def test_one_source_gives_a_size_once(pair: tuple[str, str], tmp_path: Path) -> None:
    """One source may not give a size in both units; the error names its own keys or variables."""
    values = {"ssd_cache_dir": "/x", pair[0]: 5, pair[1]: 1.0}
    with pytest.raises(ConfigError, match=f"^{pair[0]}=5: is the same size as {pair[1]}=1.0"):
        CacheConfig(**values)
    halves = {"ssd_cache_dir": "/x", pair[0]: 5, "cache_config": {pair[1]: 1.0}}
    for file in (values, {"cache_config": values}, halves):
        with pytest.raises(ConfigError, match="give one of the two"):
            settings_of(file)
    environment = {f"FLEXKV_{name.upper()}": str(value) for name, value in values.items()}
    with pytest.raises(ConfigError, match=f"^FLEXKV_{pair[0].upper()}='5': is the same size as "):
        load_settings(environment)


@pytest.mark.parametrize("pair", SIZE_PAIRS)
@pytest.mark.filterwarnings("ignore::flexkv.common.config_keys.RetiredKeyWarning")
def test_the_file_wins_over_the_environment_in_the_other_unit(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    """A size in the file wins over the environment's, and a log line names the void variable."""
    path = tmp_path / "flexkv.json"
    for name, rival in (pair, pair[::-1]):
        for nested in (False, True):
            values = {"ssd_cache_dir": "/x", name: 5}
            path.write_text(json.dumps({"cache_config": values} if nested else values))
            variable = f"FLEXKV_{rival.upper()}"
            with capture_logs() as lines:
                settings = load_settings({"FLEXKV_CONFIG_PATH": str(path), variable: "7"})
            assert getattr(settings.cache_config, name) == 5
            assert rival not in settings.cache_config.model_fields_set
            assert [(line["field"], line["by"]) for line in lines] == [(variable, name)]


def test_a_value_from_the_environment_is_named_by_its_variable(tmp_path: Path) -> None:
    """A bad value from the environment is named by its variable, one from the file by its key."""
    with pytest.raises(ConfigError, match=r"^FLEXKV_CPU_CACHE_GB='lots'"):
        load_settings({"FLEXKV_CPU_CACHE_GB": "lots"})
    path = tmp_path / "flexkv.json"
    path.write_text('{"cpu_cache_gb": -3}')
    with pytest.raises(ConfigError, match=r"^cpu_cache_gb=-3"):
        load_settings({"FLEXKV_CONFIG_PATH": str(path), "FLEXKV_CPU_CACHE_GB": "1"})


# -- what orchestrators set ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "service", ["FLEXKV", "FLEXKV_SERVER", "FLEXKV_REDIS", "FLEXKV_PY_METRICS"]
)
def test_variables_that_an_orchestrator_sets_stop_nothing(service: str) -> None:
    """The variables that Kubernetes sets for services with such names are ignored."""
    told = {
        f"{service}_SERVICE_HOST": "10.0.0.7",
        f"{service}_SERVICE_PORT": "8080",
        f"{service}_SERVICE_PORT_HTTP_METRICS": "8080",
        f"{service}_PORT": "tcp://10.0.0.7:8080",
        **{
            f"{service}_PORT_{port}_{protocol}{part}": "10.0.0.7"
            for port in (53, 8080)
            for protocol in ("TCP", "UDP", "SCTP")
            for part in ("", "_PROTO", "_PORT", "_ADDR")
        },
    }
    assert load_settings(told) == load_settings({})


@pytest.mark.parametrize(
    "variable", ["FLEXKV_PORTS", "FLEXKV_SERVICE", "FLEXKV_PORT_80_ICMP", "FLEXKV_PY_METRIC_PORT"]
)
def test_variables_that_only_resemble_them_are_errors(variable: str) -> None:
    """A mistyped variable that resembles one of an orchestrator is an error."""
    with pytest.raises(ConfigError, match="unknown variable"):
        load_settings({variable: "80"})
    assert load_settings({"FLEXKV_PY_METRICS_PORT": "81"}).py_metrics_port == 81


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("a.json", '{"num_cpu_blocks": 1, "num_cpu_blocks": 2}', "num_cpu_blocks"),
        ("a.json", "{num_cpu_blocks: 1, /* two */ num_cpu_blocks: 1}", "num_cpu_blocks"),
        ("a.json", '{"cache_config": {"evict_ratio": 0, "evict_ratio": 0}}', "evict_ratio"),
        ("a.json", '{"layer_groups": [{"head_size": 1, "head_size": 1}]}', "head_size"),
        ("a.json", '{"remote_config_custom": {"bucket": "a", "bucket": "b"}}', "bucket"),
        ("a.yaml", "num_cpu_blocks: 1\nnum_cpu_blocks: 1\n", "num_cpu_blocks"),
        ("a.yml", "cache_config:\n  evict_ratio: 0\n  evict_ratio: 1\n", "evict_ratio"),
        ("a.yaml", "cache_config: {evict_ratio: 0, 'evict_ratio': 1}", "evict_ratio"),
        ("a.yaml", "use_gds: 0\nuse_gds: 0\n", "use_gds"),
    ],
)
def test_a_key_that_occurs_twice_is_refused_by_name(
    name: str, text: str, shown: str, tmp_path: Path
) -> None:
    """A key that occurs twice in a JSON or YAML file, nested or not, is refused by name."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{shown} occurs twice"):
        load_file(path)


def test_an_unknown_key_that_occurs_twice_is_not_quoted(tmp_path: Path) -> None:
    """An unknown key that occurs twice is named by its line only, as it may be a secret."""
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nhunter2: 1\nhunter2: 1\n")
    with pytest.raises(ConfigError, match=r"<a text of 7 characters> occurs twice \(line 3\)"):
        load_file(path)


def test_keys_of_the_environment_s_objects_occur_once() -> None:
    """A JSON text for `remote_config_custom` may not have a key twice."""
    with pytest.raises(ConfigError, match="must be a JSON object"):
        CacheConfig(remote_config_custom='{"bucket": "a", "bucket": "b"}')


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_files_are_utf8_in_every_locale(
    locale: str, mark: bytes, suffix: str, tmp_path: Path
) -> None:
    """Files are read as UTF-8 in every locale, with or without a byte order mark."""
    path = tmp_path / f"flexkv.{suffix}"
    path.write_bytes(mark + '{"logging_prefix": "Knödel-節", "num_cpu_blocks": 5}'.encode())
    check = (
        "from flexkv.settings import load_settings; found = load_settings();"
        "print(ascii(found.logging_prefix), found.cache_config.num_cpu_blocks)"
    )
    environment = {"FLEXKV_CONFIG_PATH": str(path), "LC_ALL": locale, "PYTHONUTF8": "0",
                   "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": ":".join(sys.path)}  # fmt: skip
    told = subprocess.run(
        [sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=False
    )
    assert told.stdout.strip() == ascii("Knödel-節") + " 5", told.stderr


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe{\x00}\x00",
        b"\x00\x01\x02\x03",
        bytes(range(256)),
        b"[" * 200_000,
        b"{" * 200_000,
        b" " * (FILE_BYTES_MAX + 1),
        b"1",
        b'"text"',
    ],
    ids=lambda content: ascii(content[:8]),
)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_what_is_no_text_is_an_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    """Binary data, a wrong encoding, endless brackets and overlong files are errors."""
    path = tmp_path / f"flexkv.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"syntax|has more than|must contain"):
        load_file(path)


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/nowhere/flexkv.json", "\0", "x" * 5000])
def test_a_path_that_is_no_file_is_an_error(path: str) -> None:
    """A path that is not a regular file, such as an endless device, is an error."""
    with pytest.raises(ConfigError) as caught:
        load_settings({"FLEXKV_CONFIG_PATH": path})
    assert caught.value.field == "FLEXKV_CONFIG_PATH"


def test_old_and_new_names_may_stand_in_different_sources(tmp_path: Path) -> None:
    """The file wins over the environment, whichever of a key's names each of them uses."""
    path = tmp_path / "flexkv.json"
    path.write_text('{"use_gds": true}')
    with pytest.warns(RetiredKeyWarning):
        settings = load_settings({"FLEXKV_CONFIG_PATH": str(path), "FLEXKV_ENABLE_GDS": "0"})
    assert settings.cache_config.enable_gds is True


PEERS: dict[str, Any] = {
    "enable_p2p_cpu": True, "enable_p2p_ssd": True, "redis_host": "10.0.0.9", "redis_port": 6380,
    "redis_password": "of redis", "local_ip": "10.0.0.2", "node_ttl_seconds": 5.0,
    "mooncake_config_path": "/etc/mooncake.json",
}  # fmt: skip
"""The keys of sharing between nodes, as users know them."""


@pytest.mark.parametrize("way", ["nested", "flat", "environment"])
def test_the_keys_of_sharing_are_known_everywhere(way: str, tmp_path: Path) -> None:
    """Each key of sharing means the same in a file, nested or flat, and in the environment."""
    file = tmp_path / "flexkv.json"
    keys = PEERS | {"num_ssd_blocks": 8, "ssd_cache_dir": "/d"}
    if way == "environment":
        environment = {f"FLEXKV_{key.upper()}": str(each) for key, each in keys.items()}
    else:
        file.write_text(json.dumps({"cache_config": keys} if way == "nested" else keys))
        environment = {"FLEXKV_CONFIG_PATH": str(file)}
    cache = load_settings(environment).cache_config
    assert cache.redis_password.get_secret_value() == PEERS["redis_password"]
    assert {key: getattr(cache, key) for key in PEERS if key != "redis_password"} == {
        key: each for key, each in PEERS.items() if key != "redis_password"
    }
