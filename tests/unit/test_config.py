"""Configuration: every key and old name is accepted, and every fault is reported by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexkv.common.config import GB, CacheConfig, ModelConfig, settings_of
from flexkv.common.config_keys import RetiredKeyWarning
from flexkv.common.errors import ConfigError
from flexkv.settings import document, load_file, load_settings

MODEL: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_size": 8, "dtype": "float16"}
ROOT = Path(__file__).parents[2]

FILES = {
    "host.json": """{ "server_recv_port": "ipc:///tmp/flexkv_test",
      "cache_config": { "enable_cpu": true, "enable_ssd": false, "enable_remote": false,
        "num_cpu_blocks": 10240, "tokens_per_block": 16, "evict_ratio": 0.05 },
      "num_log_interval_requests": 200 }""",
    "old_names.json": """{ "enable_flexkv": true, "server_recv_port": "ipc:///tmp/flexkv_0_test",
      "cache_config": { "enable_cpu": true, "enable_ssd": false, "enable_remote": false,
        "use_gds": false, "enable_trace": false, "ssd_cache_iouring_entries": 512,
        "tokens_per_block": 64, "num_cpu_blocks": 10240, "num_ssd_blocks": 256000,
        "ssd_cache_dir": "/data/flexkv_ssd/", "evict_ratio": 0.05, "index_accel": true },
      "num_log_interval_requests": 200 }""",
    "comments.json": """{ "server_recv_port": "ipc:///tmp/flexkv_test",
      "cache_config": { "enable_cpu": true, "enable_ssd": true, "enable_remote": false,
        "tokens_per_block": 16,
        "num_cpu_blocks": 50000,   // about 400 GB of host memory
        "num_ssd_blocks": 200000,  // about 1.6 TB of SSD
        "ssd_cache_dir": "/data/flexkv_ssd/", "evict_ratio": 0.05,
        "use_ce_transfer_h2d": true, "use_ce_transfer_d2h": true, "transfer_sms_h2d": 8,
        "ssd_cache_iouring_entries": 512 } }""",
    "remote.json": """{ "server_recv_port": "ipc:///tmp/flexkv_0_test",
      "cache_config": { "enable_cpu": true, "enable_ssd": true, "enable_remote": true,
        "tokens_per_block": 64, "num_cpu_blocks": 200000, "num_ssd_blocks": 2000000,
        "num_remote_blocks": 20000000, "ssd_cache_dir": "/data/flexkv_ssd/",
        "remote_cache_path": "s3://flexkv-cache/", "evict_ratio": 0.05,
        "remote_config_custom": { "endpoint": "s3.amazonaws.com", "bucket": "flexkv-cache" } } }""",
    "flat.yaml": """
cpu_cache_gb: 32
ssd_cache_gb: 1024
ssd_cache_dir: /data/flexkv_ssd/
enable_gds: false
""",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore::flexkv.common.config_keys.RetiredKeyWarning")
def test_files_in_use_load_as_they_are(name: str, tmp_path: Path) -> None:
    """Existing files load unchanged: nested or flat, JSON with comments or YAML, with old names."""
    path = tmp_path / name
    path.write_text(FILES[name])
    cache = load_settings({"FLEXKV_CONFIG_PATH": str(path)}).cache_config
    if name == "flat.yaml":
        assert (cache.cpu_cache_gb, cache.ssd_cache_gb, cache.enable_ssd) == (32, 1024, True)
    if name == "comments.json":
        assert (cache.num_cpu_blocks, cache.transfer_num_cta_h2d) == (50000, 8)
    if name == "remote.json":
        assert (cache.remote_cache_path, cache.num_remote_blocks) == (
            ("s3://flexkv-cache/",), 20_000_000,
        )  # fmt: skip
    cache.require_built()


@pytest.mark.parametrize(
    ("old", "name", "value"),
    [
        ("use_gds", "enable_gds", False),
        ("ssd_cache_iouring_entries", "iouring_entries", 7),
        ("ssd_cache_iouring_flags", "iouring_flags", 1),
        ("transfer_sms_h2d", "transfer_num_cta_h2d", 4),
        ("transfer_sms_d2h", "transfer_num_cta_d2h", 4),
    ],
)
def test_old_names_mean_the_same_and_warn(old: str, name: str, value: object) -> None:
    """An old name means the new one and warns with both names; giving both is an error."""
    with pytest.warns(RetiredKeyWarning, match=f"{old}.*{name}"):
        assert getattr(CacheConfig(**{old: value}), name) == value
    with pytest.raises(ConfigError, match="names of one key"):
        CacheConfig(**{old: value, name: value})


@pytest.mark.parametrize(
    "key", ["cpu_kv_layout_type", "ssd_kv_layout_type", "remote_kv_layout_type"]
)
@pytest.mark.parametrize("value", ["LAYERWISE", "BLOCKWISE"])
def test_old_layouts_are_taken_with_a_warning(key: str, value: str) -> None:
    """Old layout keys are accepted with a warning that they are retired."""
    with pytest.warns(RetiredKeyWarning):
        CacheConfig(**{key: value})
    with pytest.warns(RetiredKeyWarning, match="retired"):
        CacheConfig(gpu_kv_layout_type=value)


@pytest.mark.parametrize(
    ("values", "field", "why"),
    [
        ({"num_cpu_block": 1}, "num_cpu_block", "num_cpu_blocks"),
        ({"tokens_per_block": 0}, "tokens_per_block", "greater than or equal to 1"),
        ({"tokens_per_block": "many"}, "tokens_per_block", "integer"),
        ({"evict_ratio": 2}, "evict_ratio", "less than or equal to 1"),
        ({"eviction_policy": "best"}, "eviction_policy", "lru"),
        ({"enable_ssd": True}, "ssd_cache_dir", "at least one directory"),
        ({"ssd_cache_dir": "/a;/a"}, "ssd_cache_dir", "twice"),
        ({"write_behind_max_gb": -0.5}, "write_behind_max_gb", "-1, 0 or more"),
        ({"cpu_layout": "DIAGONAL"}, "cpu_layout", "BLOCKFIRST"),
    ],
)
def test_a_wrong_key_or_value_is_named(values: dict[str, Any], field: str, why: str) -> None:
    """The error has the field and the rule that is broken."""
    with pytest.raises(ConfigError, match=why) as caught:
        CacheConfig(**values)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dtype": "complex"}, "dtype"),
        ({"use_mla": True, "kv_dim": 2}, "kv_dim"),
        ({"num_layers": 0}, "num_layers"),
        ({"layers": 3}, "layers"),
        ({"layer_groups": [{"num_layers": 1, "num_kv_heads": 1, "head_size": 8}]}, "layer_groups"),
        ({"layer_groups": [{"num_layers": 2, "num_kv_heads": 0, "head_size": 8}]}, "layer_groups"),
    ],
)
def test_a_wrong_model_is_named(changes: dict[str, Any], field: str) -> None:
    """A wrong model is refused with an error that names the field."""
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{**MODEL, **changes})
    assert caught.value.field.startswith(field)


def test_layer_groups_must_cover_the_layers_once() -> None:
    """Layer groups must cover each layer once, and ranks must divide all their heads alike."""
    group = {"num_layers": 1, "num_kv_heads": 1, "head_size": 8}
    with pytest.raises(ConfigError, match="once"):
        ModelConfig(**MODEL, layer_groups=[{**group, "layer_indices": [0]}] * 2)
    with pytest.raises(ConfigError, match="layer_indices"):
        ModelConfig(**MODEL, layer_groups=[{**group, "layer_indices": [0, 1]}] * 2)
    with pytest.raises(ConfigError, match="for all groups or for none"):
        ModelConfig(**MODEL, layer_groups=[{**group, "layer_indices": [0]}, group])
    unlike = [{**group, "num_kv_heads": heads} for heads in (3, 2)]
    with pytest.raises(ConfigError, match="the numbers must be equal"):
        ModelConfig(**MODEL, tp_size=6, layer_groups=unlike)
    wide = {**group, "num_kv_heads": 4, "dtype": "float32", "layer_indices": [0]}
    long = {**group, "num_kv_heads": 2, "compress_ratio": 4, "layer_indices": [1]}
    model = ModelConfig(**MODEL, tp_size=2, layer_groups=[long, wide])
    model.require_built()
    (space,) = model.spaces(16)
    assert space.shapes == ((16, 2, 8, 2, 4), (4, 1, 8, 2, 2))
    assert space.block_bytes == 2 * (16 * 2 * 8 * 2 * 4 + 4 * 8 * 2 * 2)
    with pytest.raises(
        ConfigError, match="tokens_per_block=6: must be a multiple of compress_ratio=4"
    ):
        model.spaces(6)


@pytest.mark.parametrize(
    ("heads", "tp_size", "use_mla", "parts"),
    [
        (8, 1, False, [0]),
        (8, 4, False, [0, 1, 2, 3]),
        (2, 4, False, [0, 0, 1, 1]),
        (1, 4, True, [0, 0, 0, 0]),
    ],
)
def test_ranks_have_parts_of_a_block(
    heads: int, tp_size: int, use_mla: bool, parts: list[int]
) -> None:
    """Each rank has the part of a block with its heads; ranks with the same heads share a part."""
    changes = {"num_kv_heads": heads, "tp_size": tp_size, "use_mla": use_mla}
    (space,) = ModelConfig(**{**MODEL, **changes}).spaces(16)
    assert [space.part_of(rank).number for rank in range(tp_size)] == parts
    assert space.block_bytes == 2 * heads * 8 * 16 * (1 if use_mla else 2) * 2


def test_heads_that_ranks_cannot_divide_are_refused() -> None:
    """A tp_size that does not divide the KV heads (four ranks, six heads) is refused."""
    with pytest.raises(ConfigError, match="tp_size=4: must divide the number of KV heads, 6"):
        ModelConfig(**{**MODEL, "num_kv_heads": 6}, tp_size=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bf16", "bfloat16", "torch.bfloat16"])
def test_every_form_of_a_dtype_is_one_name(dtype: object) -> None:
    """torch dtypes, numpy dtypes, and written and short names all give one name."""
    assert ModelConfig(**{**MODEL, "dtype": dtype}).dtype == "bfloat16"
    assert ModelConfig(**{**MODEL, "dtype": np.float16}).dtype == "float16"
    assert ModelConfig(**{**MODEL, "dtype": np.dtype("int8")}).dtype == "int8"


def test_sizes_come_from_blocks_or_gb() -> None:
    """A size is given in blocks or in GB; GB are converted to whole blocks with alignment."""
    model = ModelConfig(**MODEL)
    sizes = CacheConfig(cpu_cache_gb=1, ssd_cache_gb=2, ssd_cache_dir="/x").sized(model)
    assert sizes.block_bytes == [2 * 2 * 2 * 8 * 2 * 16]
    assert sizes.block_stride_bytes == 4096
    assert sizes.num_host_blocks == GB // 4096
    assert sizes.num_disk_blocks == 2 * GB // 4096
    assert sizes.max_file_blocks is None
    capped = CacheConfig(num_cpu_blocks=5, max_file_size_gb=1).sized(model)
    assert (capped.num_host_blocks, capped.max_file_blocks) == (5, GB // 4096)
    with pytest.raises(ConfigError, match="give one of the two"):
        CacheConfig(num_cpu_blocks=5, cpu_cache_gb=1)
    with pytest.raises(ConfigError, match="room for at least one block"):
        CacheConfig(cpu_cache_gb=0).sized(model)
    with pytest.warns(RetiredKeyWarning):
        retired = CacheConfig(max_blocks_per_file=9)
    assert retired.sized(model).max_file_blocks == 9


def test_the_file_wins_over_the_environment(tmp_path: Path) -> None:
    """The file wins over the environment, and both over defaults; old variable names work."""
    path = tmp_path / "flexkv.json"
    path.write_text('{"num_cpu_blocks": 5}')
    environment = {
        "FLEXKV_CONFIG_PATH": str(path),
        "FLEXKV_NUM_CPU_BLOCKS": "7",
        "FLEXKV_TOKENS_PER_BLOCK": "32",
        "FLEXKV_SSD_CACHE_DIR": "/a;/b",
        "ENABLE_FLEXKV": "0",
        "DYNAMO_USE_FLEXKV": "1",
        "FLEXKV_PY_METRICS_PORT": "9090",
        "UNRELATED": "x",
    }
    settings = load_settings(environment)
    assert settings.cache_config.num_cpu_blocks == 5
    assert settings.cache_config.tokens_per_block == 32
    assert settings.cache_config.ssd_cache_dir == (Path("/a"), Path("/b"))
    assert settings.enable_flexkv is False
    assert settings.dynamo_use_flexkv is True
    assert settings.py_metrics_port == 9090
    assert load_settings({}).cache_config == CacheConfig()


def test_a_size_in_the_file_wins_in_whatever_unit() -> None:
    """A size in the file wins over the environment, even if the two are in different units."""
    settings = settings_of({"num_cpu_blocks": 5}, {"cpu_cache_gb": "3"})
    assert settings.cache_config.sized(ModelConfig(**MODEL)).num_host_blocks == 5


@pytest.mark.parametrize("file", [{"sync_get": True}, {"cache_config": {"enable_cpu": False}}])
def test_settings_of_parts_that_are_not_built_are_refused(file: dict[str, Any]) -> None:
    """Keys of parts that are not built load, but are refused by name when something starts."""
    with pytest.raises(ConfigError, match="not built yet"):
        settings_of(file).require_built()


@pytest.mark.parametrize(
    ("field", "keys"),
    [
        ("enable_p2p_ssd", {"enable_p2p_ssd": True}),
        ("local_ip", {"enable_p2p_cpu": True, "local_ip": "node-7"}),
        ("local_ip", {"enable_p2p_cpu": True, "local_ip": "0.0.0.0"}),
        ("local_ip", {"enable_p2p_cpu": True, "local_ip": "::"}),
        ("cluster_secret", {"enable_p2p_cpu": True, "local_ip": "10.0.0.7"}),
        ("p2p_zone", {"p2p_zone": "a b"}),
        ("p2p_port", {"p2p_port": 65536}),
    ],
)
def test_sharing_that_cannot_work_or_is_open_to_anybody_is_refused(
    field: str, keys: dict[str, Any]
) -> None:
    """What sharing between nodes needs is checked, and the error names the key."""
    with pytest.raises(ConfigError, match=field):
        CacheConfig(**keys)


@pytest.mark.parametrize("secret", ["cluster_secret", "key_secret", "redis_password"])
def test_any_secret_lets_other_machines_in(secret: str) -> None:
    """One secret is enough to share blocks at an address that other machines reach."""
    CacheConfig(**{"enable_p2p_cpu": True, "local_ip": "10.0.0.7", secret: "a secret"})
    CacheConfig(enable_p2p_cpu=True, local_ip="127.0.0.2")
    CacheConfig(enable_p2p_cpu=True, local_ip="::1")


@pytest.mark.parametrize(
    ("path", "why"),
    [("", "remote_cache_path: enable_remote needs it"), (None, "enable_remote needs it"),
     ("s3://one/;s3://two/", "remote_cache_path: a remote tier has one address, not 2"),
     (7, "remote_cache_path=7: must be a URL as text")],
)  # fmt: skip
def test_a_remote_tier_has_one_address(path: Any, why: str) -> None:
    """A remote tier without an address, or with two, is refused by the key."""
    with pytest.raises(ConfigError, match=why):
        CacheConfig(enable_remote=True, remote_cache_path=path)


def test_keys_of_remote_files_warn() -> None:
    """Keys of a layout in files are accepted, and a warning says that they are ignored."""
    with pytest.warns(RetiredKeyWarning, match="remote_file_num is ignored"):
        CacheConfig(enable_remote=True, remote_cache_path="s3://b/", remote_file_num=4)


def test_old_names_in_the_environment_warn() -> None:
    """Old names in the environment warn as they do in a file."""
    with pytest.warns(RetiredKeyWarning, match="use_gds"):
        load_settings({"FLEXKV_USE_GDS": "0"})


@pytest.mark.parametrize(
    ("environment", "field", "why"),
    [
        ({"FLEXKV_NUM_CPU_BLOCK": "7"}, "FLEXKV_NUM_CPU_BLOCK", "FLEXKV_NUM_CPU_BLOCKS"),
        ({"FLEXKV_TOKENS_PER_BLOCK": "many"}, "FLEXKV_TOKENS_PER_BLOCK", "integer"),
        ({"FLEXKV_CONFIG_PATH": "/nowhere.json"}, "FLEXKV_CONFIG_PATH", "No such file"),
    ],
)
def test_a_wrong_environment_is_named(environment: dict[str, str], field: str, why: str) -> None:
    """Unknown variables, wrong values and a missing file are errors that name the variable."""
    with pytest.raises(ConfigError, match=why) as caught:
        load_settings(environment)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.json", "{", "syntax"),
        ("a.yaml", "a: [", "syntax"),
        ("a.json", "[1]", "object"),
    ],
)
def test_a_broken_file_is_named(name: str, text: str, why: str, tmp_path: Path) -> None:
    """A syntax error or a top level that is not an object is an error that says so."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        load_file(path)
    path.write_text("" if name == "a.yaml" else "{}")
    assert load_file(path) == {}


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ({"num_cpu_blocks": 1, "cache_config": {"num_cpu_blocks": 2}}, "another value"),
        ({"cache_config": 5}, "object"),
        ({5: 5}, "must be a string"),
        ({"num_cpu_blocksx": 1}, "num_cpu_blocks"),
    ],
)
def test_contradictions_in_a_file_are_errors(file: dict[Any, Any], why: str) -> None:
    """One key with two values, a cache_config that is no object and unknown keys are errors."""
    with pytest.raises(ConfigError, match=why):
        settings_of(file)


def test_secrets_are_never_shown() -> None:
    """Neither `repr` nor an error shows a secret."""
    cache = CacheConfig(key_secret="hunter2", redis_password="hunter2")
    assert "hunter2" not in repr(cache)
    for wrong in ({"key_secre": "hunter2"}, {"redis_password": ["hunter2"]}):
        with pytest.raises(ConfigError) as caught:
            CacheConfig(**wrong)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_settings({"FLEXKV_REDIS_PASSWOR": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_the_document_is_up_to_date() -> None:
    """docs/configuration.md is what `python -m flexkv.settings` generates from the definitions."""
    assert (ROOT / "docs/configuration.md").read_text() == document()
