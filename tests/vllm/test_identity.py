"""Tests that a model's name depends on its weights and on how they are computed with, only."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import huggingface_hub
import torch

from flexkv.common.errors import ConfigError
from flexkv.integration.vllm import files, identity, model
from flexkv.integration.vllm.files import SAMPLE_BYTES, SAMPLES, WHOLE_BYTES_MAX, facts_of
from flexkv.integration.vllm.setup import setup_of
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl

COMMITS = "a" * 40, "b" * 40
REPO = "org/tiny"


@pytest.fixture
def config(configured: Any) -> Any:
    """Return a configuration that a test may change."""
    return copy.deepcopy(configured)


@pytest.fixture
def folder(config: Any, tmp_path: Path) -> Path:
    """Return a copy of the model's folder, which a test may change."""
    config.model_config.model = str(shutil.copytree(config.model_config.model, tmp_path / "model"))
    return Path(config.model_config.model)


def name_of(config: Any) -> str:
    """Return the model's name, as a server gets it."""
    return setup_of(config).model.model_id


class Hub:
    """The cache of Hugging Face models, with one repository."""

    def __init__(self, cache: Path, model: str) -> None:
        self.cache, self._model = cache, Path(model)
        self.repo = cache / "models--org--tiny"

    def commit(self, name: str, weights: bytes = b"", branch: str = "main") -> Path:
        """Move a branch to a commit whose weights have these bytes appended; return its folder."""
        snapshot = self.repo / "snapshots" / name
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in self._model.iterdir():
            content = file.read_bytes() + (weights if file.suffix == ".safetensors" else b"")
            blob = self.repo / "blobs" / f"{hash(content) & (1 << 64) - 1:064x}"
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(content)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        (self.repo / "refs").mkdir(exist_ok=True)
        (self.repo / "refs" / branch).write_text(name)
        return snapshot


@pytest.fixture
def hub(configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Return a cache in the test's folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return Hub(tmp_path / "hub", configured.model_config.model)


def test_a_hub_model_that_moves_to_another_commit_has_another_name(config: Any, hub: Hub) -> None:
    """A hub model has one name for each commit, whichever branch it is asked for by."""
    config.model_config.model = REPO
    for revision in (None, "main", "stable"):
        config.model_config.revision = revision
        branch = revision or "main"
        names = []
        for commit in (COMMITS[0], COMMITS[1], COMMITS[0]):
            if not (hub.repo / "snapshots" / commit).exists():
                hub.commit(commit, commit.encode())
            (hub.repo / "refs" / branch).write_text(commit)
            names.append(name_of(config))
        assert names[0] == names[2] != names[1]


def test_a_commit_has_one_name_however_it_is_asked_for(config: Any, hub: Hub) -> None:
    """A commit has one name by branch, by commit, by folder and from any cache."""
    snapshot = hub.commit(COMMITS[0])
    names = set()
    for where, revision in (
        (REPO, None),
        (REPO, "main"),
        (REPO, COMMITS[0]),
        (str(snapshot), None),
    ):
        config.model_config.model, config.model_config.revision = where, revision
        names.add(name_of(config))
    moved = hub.cache.rename(hub.cache.parent / "elsewhere")
    config.model_config.model, config.load_config.download_dir = REPO, str(moved)
    names.add(name_of(config))
    assert len(names) == 1
    assert REPO in names.pop()


def test_a_hub_model_of_the_same_content_has_another_name_at_another_commit(
    config: Any, hub: Hub
) -> None:
    """Two commits with the same files have two names, since other files may not be downloaded."""
    config.model_config.model = REPO
    hub.commit(COMMITS[0])
    first = name_of(config)
    hub.commit(COMMITS[1])
    assert name_of(config) != first


def test_a_blob_of_the_hub_that_was_overwritten_has_another_name(config: Any, hub: Hub) -> None:
    """An overwritten blob gives another name, though the name of the blob stays the same."""
    weights = (hub.commit(COMMITS[0]) / "model.safetensors").resolve()
    config.model_config.model = REPO
    first = name_of(config)
    weights.write_bytes(bytes(weights.stat().st_size))
    assert name_of(config) != first


def _overwrite(folder: Path) -> None:
    """Replace the weights by others of the same size and time."""
    file = folder / "model.safetensors"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _touch(folder: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))


def _add(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"more")


WEIGHTS: dict[str, Callable[[Path], None]] = {
    "overwritten": _overwrite,
    "touched": _touch,
    "another_shard": lambda folder: _add(folder, "model-00002-of-00002.safetensors"),
    "index": lambda folder: _add(folder, "model.safetensors.index.json"),
    "nested": lambda folder: _add(folder, "nested/weights.pt"),
    "renamed": lambda folder: (folder / "model.safetensors").rename(folder / "m.safetensors"),
    "scales": lambda folder: _add(folder, "hf_quant_config.json"),
    "kv_scales": lambda folder: _add(folder, "kv_cache_scales.json"),
    "code": lambda folder: _add(folder, "modeling_other.py"),
    "adapter": lambda folder: _add(folder, "adapter_model.safetensors"),
}


@pytest.mark.parametrize("change", WEIGHTS)
def test_other_files_of_weights_are_another_model(config: Any, folder: Path, change: str) -> None:
    """Other weight files give another name, even under the same path; equal ones the same name."""
    first = name_of(config)
    assert name_of(copy.deepcopy(config)) == first
    WEIGHTS[change](folder)
    assert name_of(config) != first


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md",
             ".cache/huggingface/lock", "chat_template.jinja", ".git/index"],
)  # fmt: skip
def test_files_beside_the_weights_do_not_matter(config: Any, folder: Path, name: str) -> None:
    """Files beside the weights do not change the name, since keys depend on tokens, not on text."""
    first = name_of(config)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")
    assert name_of(config) == first


def test_a_link_to_a_folder_stands_for_what_it_leads_to(
    config: Any, folder: Path, tmp_path: Path
) -> None:
    """A link stands for the folder that it leads to; circular links are harmless."""
    other = shutil.copytree(folder, tmp_path / "other")
    _overwrite(other)
    (other / "circle").symlink_to(other)
    link = tmp_path / "current"
    names = []
    for target in (folder, other, folder):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        config.model_config.model = str(link)
        names.append(name_of(config))
    assert names[0] == names[2] != names[1]


def test_a_single_file_may_be_the_model(config: Any, tmp_path: Path) -> None:
    """A model may be a single file, such as GGUF."""
    file = tmp_path / "model.gguf"
    config.model_config.model = str(file)
    names = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        names.append(name_of(config))
    assert names[0] != names[1]


def test_every_sample_of_a_large_file_counts(tmp_path: Path) -> None:
    """Every sample of a large file counts, also the first and last bytes, even at equal times."""
    size = 4 * WHOLE_BYTES_MAX
    file = tmp_path / "large"
    file.write_bytes(bytes(size))
    seen = {str(facts_of(file))}
    changed = file.stat().st_mtime_ns
    for sample in range(SAMPLES):
        at = (size - SAMPLE_BYTES) * sample // (SAMPLES - 1)
        for position in (at, at + SAMPLE_BYTES - 1):
            file.write_bytes(bytes(position) + b"x" + bytes(size - position - 1))
            os.utime(file, ns=(changed, changed))
            seen.add(str(facts_of(file)))
    assert len(seen) == 1 + 2 * SAMPLES


def test_a_folder_that_cannot_be_read_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that cannot be read raises, since models may differ in that folder only."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    unreadable = tmp_path / "experts"
    unreadable.mkdir()
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if Path(path) == unreadable:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    assert len(facts_of(tmp_path)) == 1
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="experts"):
        facts_of(tmp_path)


def test_a_folder_of_too_many_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of FILES_MAX files is read, and one of more is refused by name."""
    monkeypatch.setattr(files, "FILES_MAX", 2)
    for number in range(2):
        (tmp_path / f"{number}.safetensors").write_bytes(b"weights")
    assert len(facts_of(tmp_path)) == 2
    (tmp_path / "2.safetensors").write_bytes(b"weights")
    with pytest.raises(OSError, match=f"{tmp_path} has more than 2 files"):
        facts_of(tmp_path)


OPTIONS: list[tuple[str, str, Any]] = [
    ("model_config", "quantization", "fp8"),
    ("model_config", "quantization_config", {"linear": "fp8"}),
    ("model_config", "dtype", torch.bfloat16),
    ("model_config", "hf_overrides", {"rope_theta": 5.0}),
    ("model_config", "override_attention_dtype", "float32"),
    ("model_config", "disable_sliding_window", True),
    ("model_config", "model_class_overrides", {"LlamaForCausalLM": "other"}),
    ("model_config", "model_impl", "transformers"),
    ("model_config", "trust_remote_code", True),
    ("model_config", "code_revision", "other"),
    ("model_config", "quantization_param_path", "/scales.json"),
    ("model_config", "runner", "pooling"),
    ("load_config", "load_format", "pt"),
    ("load_config", "load_format", "dummy"),
    ("load_config", "safetensors_load_strategy", "torchao"),
    ("load_config", "model_loader_extra_config", {"qlora_adapter_name_or_path": "a"}),
    ("load_config", "ignore_patterns", ["*.pt"]),
    ("cache_config", "cache_dtype", "fp8_e4m3"),
    ("cache_config", "calculate_kv_scales", True),
    ("cache_config", "kv_cache_dtype_skip_layers", ["1"]),
    ("attention_config", "disable_flashinfer_q_quantization", True),
    ("device_config", "device_type", "cuda"),
    ("model_config.hf_config", "rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),
    ("model_config.hf_config", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("model_config.hf_config", "sliding_window", 128),
    ("model_config.hf_config", "quantization_config", {"kv_cache_scheme": {"num_bits": 8}}),
    ("model_config.hf_config", "vocab_size", 1025),
]  # fmt: skip


def put(config: Any, where: str, name: str, value: Any) -> None:
    """Set an option of vLLM, even one that only another version has."""
    for part in where.split("."):
        config = getattr(config, part)
    kind = type(config)
    if dataclasses.is_dataclass(kind) and name not in kind.__dataclass_fields__:
        config.__class__ = dataclasses.make_dataclass(
            kind.__name__, [(name, Any, dataclasses.field(default=None, kw_only=True))],
            bases=(kind,), init=False,
        )  # fmt: skip
    object.__setattr__(config, name, value)


@pytest.mark.parametrize(("where", "option", "value"), OPTIONS, ids=lambda v: str(v)[:40])
def test_what_computes_other_kv_is_another_model(
    config: Any, where: str, option: str, value: Any
) -> None:
    """Each option that changes the KV gives another name, options of other versions included."""
    first = identity.model_id(config)
    put(config, where, option, value)
    assert identity.model_id(config) != first


@pytest.mark.parametrize(
    ("where", "option", "value"),
    [
        ("model_config", "tokenizer", "other"),
        ("model_config", "tokenizer_revision", "other"),
        ("model_config", "served_model_name", "other"),
        ("model_config", "seed", 7),
        ("model_config", "max_model_len", 64),
        ("model_config", "max_logprobs", 3),
        ("model_config", "enforce_eager", True),
        ("model_config", "generation_config", "vllm"),
        ("load_config", "use_tqdm_on_load", False),
        ("cache_config", "gpu_memory_utilization", 0.5),
        ("cache_config", "enable_prefix_caching", False),
        ("compilation_config", "cudagraph_capture_sizes", [1]),
        ("scheduler_config", "max_num_seqs", 3),
    ],
)  # fmt: skip
def test_what_computes_the_same_kv_is_the_same_model(
    config: Any, where: str, option: str, value: Any
) -> None:
    """Options that do not change the KV do not change the name."""
    first = identity.model_id(config)
    put(config, where, option, value)
    assert identity.model_id(config) == first


def test_random_weights_are_named_by_their_seed(config: Any) -> None:
    """Random weights are named by their seed."""
    config.load_config.load_format = "dummy"
    first = identity.model_id(config)
    config.model_config.seed = 7
    assert identity.model_id(config) != first


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic"}, {"type": "longrope"}, {"full": {"rope_type": "longrope"}}]
)
def test_the_longest_prompt_counts_where_rotary_embeddings_depend_on_it(
    config: Any, rope: dict[str, Any]
) -> None:
    """The longest prompt's length counts if rotary embeddings depend on it."""
    config.model_config.hf_config.rope_parameters = rope
    first = identity.model_id(config)
    config.model_config.max_model_len = 64
    assert identity.model_id(config) != first


def test_no_two_lists_of_facts_read_the_same(config: Any) -> None:
    """Two lists of facts never give one name, since no fact can contain the separator."""
    config.model_config.code_revision, config.model_config.quantization = 'a","b', "c"
    first = identity.model_id(config)
    config.model_config.code_revision, config.model_config.quantization = "a", 'b","c'
    assert identity.model_id(config) != first


def restarted(config: Any) -> Any:
    """Return the same configuration in another engine."""
    again = copy.deepcopy(config)
    again.kv_transfer_config.engine_id = "another"
    return again


@pytest.mark.parametrize(
    ("where", "option", "value"),
    [
        ("model_config", "model_weights", "s3://bucket/model"),
        ("load_config", "load_format", "modelexpress"),
        ("load_config", "model_loader_extra_config", {"tensorizer_uri": "s3://bucket/tensors"}),
        (".", "weight_transfer_config", SimpleNamespace(backend="nccl")),
    ],
)
def test_weights_that_cannot_be_looked_at_are_named_by_their_engine(
    config: Any, where: str, option: str, value: Any
) -> None:
    """Weights that cannot be inspected are named by their engine, unless the user names them."""
    config.kv_transfer_config.engine_id = "this"
    (setattr(config, option, value) if where == "." else put(config, where, option, value))
    assert identity.model_id(config) != identity.model_id(restarted(config))
    rank = copy.deepcopy(config)
    rank.kv_transfer_config.engine_id = "this_dp1"  # of a data-parallel engine
    assert identity.model_id(config) == identity.model_id(rank)
    config.kv_transfer_config.kv_connector_extra_config = {"weights_id": "v1"}
    named = identity.model_id(config)
    assert named == identity.model_id(restarted(config))
    config.kv_transfer_config.kv_connector_extra_config = {"weights_id": "v2"}
    assert named != identity.model_id(config)


def test_kv_whose_scales_an_engine_measures_is_of_no_use_to_another(config: Any) -> None:
    """If an engine measures the KV's scales, no other has its name, whatever the weights' name."""
    config.kv_transfer_config.engine_id = "this"
    config.kv_transfer_config.kv_connector_extra_config = {"weights_id": "v1"}
    put(config, "cache_config", "calculate_kv_scales", True)
    assert identity.model_id(config) != identity.model_id(restarted(config))


def test_files_that_options_name_are_looked_at(config: Any, tmp_path: Path) -> None:
    """Files that options name, such as scales and serialised tensors, count by their content."""
    file = tmp_path / "model-000.tensors"
    for option in ({"tensorizer_uri": str(tmp_path / "model-%03d.tensors")}, {"at": str(file)}):
        put(config, "load_config", "model_loader_extra_config", option)
        file.write_bytes(b"one")
        first = identity.model_id(config)
        file.write_bytes(b"two")
        assert identity.model_id(config) != first


def test_code_of_another_repository_counts(config: Any, hub: Hub) -> None:
    """Code of another repository counts by its commit, where it may run."""
    hub.commit(COMMITS[0])
    config.model_config.trust_remote_code = True
    config.model_config.hf_config.auto_map = {"AutoModel": f"{REPO}--modeling.Tiny"}
    first = identity.model_id(config)
    hub.commit(COMMITS[1])
    assert identity.model_id(config) != first


def test_a_model_that_changes_its_configuration_keeps_its_name(
    config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that changes its configuration while it is loaded keeps its name.

    Files are read after the load, since some may be downloaded during it.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from flexkv.integration.vllm import vllm_v1_adapter

    monkeypatch.setattr(vllm_v1_adapter, "_tp_rank", lambda: 0)
    monkeypatch.setattr(vllm_v1_adapter, "get_kv_transfer_group", lambda: None)
    monkeypatch.setenv("FLEXKV_SERVER_RECV_PORT", f"ipc://{tmp_path}/socket")
    expected = name_of(copy.deepcopy(config))
    (hidden,) = folder.glob("*.safetensors")
    hidden.rename(tmp_path / "downloading")
    connector = FlexKVConnectorV1Impl(config, KVConnectorRole.WORKER)
    assert connector.worker is not None
    assert connector.worker.setup.model.model_id != expected
    config.model_config.hf_config.max_position_embeddings = 7
    (tmp_path / "downloading").rename(hidden)
    with pytest.raises(ConfigError, match="at least one layer"):
        connector.register_kv_caches({})
    assert connector.worker.setup.model.model_id == expected
    connector.shutdown()


def test_a_server_is_not_told_of_a_model_without_its_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model file for a server cannot be made without weights: no engine would have that name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    words = [str(folder), "--dtype", "float32", "--skip-tokenizer-init"]
    assert model.model_of(words).model_id.startswith(f"vllm {folder} ")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="download them first"):
        model.model_of(words)
