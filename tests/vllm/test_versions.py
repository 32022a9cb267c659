"""Tests that several versions of vLLM have what the connector uses of them.

These are the installed one, wheels of earlier ones that `scripts/vllm-venv` downloaded, and the
code of a newer one that `scripts/vllm-tests` unpacked. They are only parsed: nothing of them is
run here.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl

OLDER, NEWER = Path(sys.prefix) / "older", Path(sys.prefix) / "upstream"
SOURCES = Path(__file__).parents[2] / "flexkv/integration/vllm"
Read = Callable[[str], ast.Module]
CONNECTOR = "vllm/distributed/kv_transfer/kv_connector/v1"


def _versions() -> dict[str, Read]:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    site = Path(spec.origin).parents[1]
    found: dict[str, Read] = {"installed": lambda name: ast.parse((site / name).read_text())}
    for wheel in sorted(OLDER.glob("vllm*.whl")):
        archive = zipfile.ZipFile(wheel)
        found[wheel.name.split("-")[1]] = lambda name, a=archive: ast.parse(a.read(name))
    for code in sorted(NEWER.glob("*/code")):
        found[code.parent.name] = lambda name, c=code: ast.parse((c / name).read_text())
    return found


VERSIONS = _versions()


def names_in(tree: ast.Module) -> set[str]:
    """Return what a module defines or imports at its top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def fields_of(tree: ast.Module, name: str) -> set[str]:
    """Return the fields, methods and properties of a class."""
    (found,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name]
    fields = {
        node.target.id
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    methods = {n.name for n in found.body if isinstance(n, ast.FunctionDef)}
    assigned = {
        node.attr
        for node in ast.walk(found)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return fields | methods | assigned


def test_several_versions_are_looked_at() -> None:
    """The installed version is compared and, where `make test-vllm` set up, three others."""
    assert "installed" in VERSIONS
    if OLDER.is_dir():
        assert len(VERSIONS) >= 4


@pytest.mark.parametrize("version", VERSIONS)
def test_the_shim_calls_what_there_is(version: str) -> None:
    """Each call of the shim has a method of ours that takes its arguments."""
    tree = VERSIONS[version](f"{CONNECTOR}/flexkv_connector.py")
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Attribute)
        and node.func.value.attr == "_flexkv_connector"
    ]
    assert len(calls) >= 15
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        method = getattr(FlexKVConnectorV1Impl, call.func.attr)
        inspect.signature(method).bind(None, *[None] * len(call.args))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_imported_is_there(version: str) -> None:
    """Each `from vllm… import …` of the connector finds its names."""
    for path in SOURCES.glob("*.py"):
        if path.name == "demo.py":
            continue  # it is run with the installed version only
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vllm"):
                continue
            assert node.module is not None
            base = node.module.replace(".", "/")
            try:
                tree = VERSIONS[version](f"{base}.py")
            except (KeyError, OSError):
                tree = VERSIONS[version](f"{base}/__init__.py")
            stars = any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in tree.body)
            missing = {alias.name for alias in node.names} - names_in(tree)
            assert stars or not missing, (path.name, node.module, missing)


LOOKED_AT = {
    ("vllm/v1/core/sched/output.py", "SchedulerOutput"): {
        "scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens",
        "scheduled_spec_decode_tokens",
    },
    ("vllm/v1/core/sched/output.py", "NewRequestData"): {
        "req_id", "block_ids", "num_computed_tokens",
    },
    ("vllm/v1/core/sched/output.py", "CachedRequestData"): {
        "req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens",
    },
    ("vllm/v1/request.py", "Request"): {
        "request_id", "num_tokens", "all_token_ids", "lora_request", "cache_salt", "mm_features",
        "block_hashes",
    },
    ("vllm/config/vllm.py", "VllmConfig"): {"kv_events_config", "kv_transfer_config"},
    ("vllm/distributed/kv_events.py", "BlockStored"): {
        "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium",
        "lora_name", "extra_keys",
    },
    ("vllm/distributed/kv_events.py", "BlockRemoved"): {"block_hashes", "medium"},
    ("vllm/config/parallel.py", "ParallelConfig"): {
        "pipeline_parallel_size", "tensor_parallel_size", "data_parallel_rank",
    },
    ("vllm/config/model.py", "ModelConfig"): {
        "get_num_layers", "get_total_num_kv_heads", "get_head_size", "use_mla", "hf_config",
        "hf_text_config", "get_sliding_window", "is_hybrid", "revision", "quantization",
    },
    ("vllm/config/kv_transfer.py", "KVTransferConfig"): {
        "kv_role", "kv_connector", "kv_connector_extra_config", "engine_id",
    },
    ("vllm/config/load.py", "LoadConfig"): {
        "load_format", "download_dir", "model_loader_extra_config",
    },
    ("vllm/config/lora.py", "LoRAConfig"): {"lora_dtype", "enable_tower_connector_lora"},
    ("vllm/config/multimodal.py", "MultiModalConfig"): {"mm_processor_cache_gb"},
    ("vllm/lora/request.py", "LoRARequest"): {
        "lora_name", "lora_int_id", "lora_path", "load_inplace",
    },
    ("vllm/multimodal/inputs.py", "MultiModalFeatureSpec"): {
        "identifier", "modality", "mm_position",
    },
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("where", LOOKED_AT, ids=lambda where: where[1])
def test_what_is_looked_at_is_there(version: str, where: tuple[str, str]) -> None:
    """The classes of vLLM have the attributes that the connector uses."""
    tree = VERSIONS[version](where[0])
    assert LOOKED_AT[where] - fields_of(tree, where[1]) == set()
