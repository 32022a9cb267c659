"""Tests that prompts of equal tokens share blocks only if adapter, salt and images are equal."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import huggingface_hub
from vllm.config.multimodal import MultiModalConfig
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.renderers.base import BaseRenderer
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from flexkv.common.config import ModelConfig
from flexkv.index.keys import KeyChain
from flexkv.integration.vllm import adapters, files, setup
from flexkv.integration.vllm.prompt import Scopes

TOKENS = list(range(64))
SPACE = ModelConfig(num_layers=1, num_kv_heads=1, head_size=8, dtype="float16").spaces(16)[0]
CHAIN = KeyChain(SPACE)


def request(**more: Any) -> Request:
    """Return a request as vLLM's scheduler has it."""
    sampling = SamplingParams(max_tokens=1)
    return Request("r", TOKENS, sampling, None, **more)


def keys_of(scopes: Scopes, **more: Any) -> bytes | None:
    """Return the keys of such a request's blocks; None if it is not cached."""
    asked = request(**more)
    scope = scopes.scope_of(asked, scopes.parts_of(asked))
    return None if scope is None else CHAIN.keys(TOKENS, scope)


@pytest.fixture
def scopes() -> Scopes:
    """Return the scopes of an engine that has seen no adapter yet."""
    return Scopes()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Return the folder of an adapter."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(4096))
    return folder


def lora(path: Path | str, name: str = "a", number: int = 1, **more: Any) -> LoRARequest:
    """Return the part of a request that names its adapter."""
    return LoRARequest(name, number, str(path), **more)


def test_an_adapter_has_keys_of_its_own(scopes: Scopes, adapter: Path) -> None:
    """An adapter has keys of its own, equal in every engine, whatever number vLLM gives it."""
    keys = keys_of(scopes, lora_request=lora(adapter))
    assert keys is not None
    assert keys != keys_of(scopes)
    assert keys == keys_of(scopes, lora_request=lora(adapter))
    assert keys == keys_of(Scopes(), lora_request=lora(adapter, number=5))
    assert keys == keys_of(Scopes(), lora_request=lora(adapter, load_inplace=True))


def retrain(adapter: Path) -> None:
    """Replace an adapter's weights by others of the same size and times."""
    file = adapter / "adapter_model.safetensors"
    before = file.stat()
    file.write_bytes(os.urandom(before.st_size))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "retrained": retrain,
    "touched": lambda adapter: os.utime(adapter / "adapter_model.safetensors", ns=(1, 1)),
    "config": lambda adapter: (adapter / "adapter_config.json").write_text('{"r": 9}'),
    "more": lambda adapter: (adapter / "more.bin").write_bytes(b"1"),
    "longer": lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(bytes(8192)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_was_trained_again_has_other_keys(adapter: Path, change: str) -> None:
    """A retrained adapter of the same name and path has other keys once an engine loads it anew."""
    scopes = Scopes()
    first = keys_of(scopes, lora_request=lora(adapter))
    CHANGES[change](adapter)  # type: ignore[operator]
    loaded_anew = keys_of(scopes, lora_request=lora(adapter, number=2))
    assert loaded_anew == keys_of(Scopes(), lora_request=lora(adapter))
    assert loaded_anew is not None
    assert loaded_anew != first
    assert keys_of(scopes, lora_request=lora(adapter, number=3, load_inplace=True)) == loaded_anew


def test_an_adapter_whose_files_change_while_it_is_loaded_is_not_cached(
    scopes: Scopes, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter whose files change while it is loaded is not cached, and this is logged once."""
    assert keys_of(scopes, lora_request=lora(adapter)) is not None
    retrain(adapter)
    for _ in range(3):
        assert keys_of(scopes, lora_request=lora(adapter)) is None
    assert caplog.text.count("adapter_not_cached") == 1


@pytest.mark.parametrize("path", ["/nowhere/at/all", "org/not-on-this-machine"])
def test_an_adapter_whose_files_cannot_be_looked_at_is_not_cached(
    scopes: Scopes, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter whose files cannot be read is not cached, and this is logged once."""
    scopes.adapters.has_run(lora(path))
    for _ in range(3):
        assert keys_of(scopes, lora_request=lora(path)) is None
    assert caplog.text.count("adapter_not_cached") == 1


def test_names_and_paths_of_adapters_do_not_run_together(scopes: Scopes, tmp_path: Path) -> None:
    """Adapters whose names and paths read the same when joined have different keys."""
    folders = [tmp_path / "c", Path(f"{tmp_path}/b:") / str(tmp_path).lstrip("/") / "c"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "adapter_model.bin").write_bytes(b"1")
        os.utime(folder / "adapter_model.bin", ns=(1, 1))
    one = keys_of(scopes, lora_request=lora(folders[0], name=f"a:{tmp_path}/b:"))
    other = keys_of(scopes, lora_request=lora(f"{tmp_path}/b:{folders[0]}", name="a", number=2))
    assert None not in (one, other)
    assert one != other


def test_a_salt_is_never_taken_for_an_adapter(scopes: Scopes, adapter: Path) -> None:
    """A salt never gives the keys of an adapter, whatever it says."""
    named = lora(adapter)
    parts = scopes.parts_of(request(lora_request=named))
    assert parts is not None
    seen = {keys_of(scopes), keys_of(scopes, lora_request=named)}
    salts = ["x", "lora", "lora:x", "salt", *parts, "\0".join(parts), str(parts)]
    seen |= {keys_of(scopes, cache_salt=salt) for salt in salts}
    seen |= {keys_of(scopes, cache_salt=salt, lora_request=named) for salt in salts}
    assert len(seen) == 2 + 2 * len(set(salts))


def test_how_adapters_are_applied_counts(adapter: Path) -> None:
    """Adapters applied in another precision, or to other layers, have other keys."""
    named = lora(adapter)
    assert keys_of(Scopes(lora="float16"), lora_request=named) != keys_of(
        Scopes(lora="float32"), lora_request=named
    )
    assert keys_of(Scopes(lora="float16")) == keys_of(Scopes(lora="float32"))
    assert keys_of(Scopes(), lora_request=lora(adapter, is_3d_lora_weight=True)) != keys_of(
        Scopes(), lora_request=named
    )


def test_unchanged_files_are_read_once(
    scopes: Scopes, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unchanged files are read once, if they are so old that a change changes their time stamp."""
    reads: list[Path] = []

    def counted(place: Path) -> Any:
        reads.append(place)
        return files.facts_of(place)

    monkeypatch.setattr(adapters, "facts_of", counted)
    monkeypatch.setattr(adapters, "RACY_NS", 0)
    for number in range(1, 6):
        keys_of(scopes, lora_request=lora(adapter, number=number))
    assert len(reads) == 1
    retrain(adapter)
    keys_of(scopes, lora_request=lora(adapter, number=6))
    assert len(reads) == 2


def test_a_file_system_that_hangs_holds_up_no_step(
    scopes: Scopes, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one request waits, briefly, for a hung file system; once it answers, all are cached."""
    hangs = threading.Event()

    def stamps(place: Path) -> Any:
        hangs.wait(60)
        return files.stamps_of(place)

    monkeypatch.setattr(adapters, "stamps_of", stamps)
    assert keys_of(scopes, lora_request=lora(adapter)) is None
    monkeypatch.setattr(adapters, "LOOK_S", 60.0)
    begin = time.monotonic()
    for _ in range(100):
        assert keys_of(scopes, lora_request=lora(adapter)) is None
    assert time.monotonic() - begin < 30
    hangs.set()
    assert scopes.adapters._looks[str(adapter)].over.wait(60)
    assert keys_of(scopes, lora_request=lora(adapter)) is not None


@pytest.fixture
def hub(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the hub's folder of an adapter, whose branch is at one of two commits."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--adapter"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(adapter, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    return repo


def test_an_adapter_of_the_hub_is_named_by_its_commit(scopes: Scopes, hub: Path) -> None:
    """An adapter of the hub is named by its commit once it has run; before, it may be fetched."""
    asked = lora("org/adapter")
    assert keys_of(scopes, lora_request=asked) is None
    scopes.adapters.has_run(asked)
    first = keys_of(scopes, lora_request=asked)
    assert first is not None
    (hub / "refs" / "main").write_text("b" * 40)
    assert keys_of(scopes, lora_request=asked) is None
    again = Scopes()
    again.adapters.has_run(asked)
    assert keys_of(again, lora_request=asked) not in (None, first)
    (hub / "refs" / "main").write_text("a" * 40)
    again = Scopes()
    again.adapters.has_run(asked)
    assert keys_of(again, lora_request=asked) == first


# -- images -------------------------------------------------------------------------------------


class Items(dict[str, Any]):
    """Parsed images, as vLLM's renderer has them."""

    def __init__(self, images: list[Any]) -> None:
        super().__init__(image=Images(images))

    def get_all_counts(self) -> dict[str, int]:
        """Return the number of items by modality."""
        return {"image": len(self["image"])}


class Images(list[Any]):
    """The images of one prompt."""

    def get_all_items_for_hash(self) -> list[Any]:
        """Return what is hashed of each image."""
        return list(self)


def media_config(prefix_caching: bool, cache_gb: float) -> Any:
    """Return the configuration of a model with images, as far as vLLM's renderer and we use it."""
    media = MultiModalConfig(mm_processor_cache_gb=cache_gb)
    return SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=media),
        cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching),
    )


def rendered(config: Any, number: int, image: Any, uuid: str | None, kwargs: Any) -> Any:
    """Return the feature of a prompt's image, as the `number`th request of vLLM's renderer."""
    renderer: Any = SimpleNamespace(model_config=config.model_config, config=config)
    renderer._validate_mm_uuids = lambda *_: None
    items: Any = Items([image])
    uuids: Any = {} if uuid is None else {"image": [uuid]}
    named = BaseRenderer._process_mm_uuids(
        renderer, {"image": [image]}, items, uuids, f"renderer0-mm-{number}"
    )
    inputs = ProcessorInputs(TOKENS, items, named, hf_processor_mm_kwargs=kwargs)
    (name,) = inputs.get_mm_hashes("model", "blake3")["image"]
    return MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset=8, length=8), name)


@pytest.mark.parametrize("kwargs", [{}, {"size": 3}], ids=["", "kwargs"])
@pytest.mark.parametrize("uuid", [None, "mine"])
@pytest.mark.parametrize("cache_gb", [0, 4])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_two_pictures_never_share_a_key(
    prefix_caching: bool, cache_gb: float, uuid: str | None, kwargs: dict[str, Any]
) -> None:
    """Two images never share a key; where vLLM only numbers images, they are not cached."""
    config = media_config(prefix_caching, cache_gb)
    scopes = Scopes(setup._names_media(config))
    one, other, same = (
        keys_of(
            scopes, mm_features=[rendered(config, 0, image, uuid and f"{uuid}-{image}", kwargs)]
        )
        for image in ("cat", "dog", "cat")
    )
    if prefix_caching or cache_gb:
        assert None not in (one, other)
        assert one != other
        assert one == same
    else:
        assert (one, other) == (None, None)
    assert keys_of(scopes) is not None


@pytest.mark.parametrize("name", ["renderer0-mm-0-image-0", "a:renderer3-mm-12-image-0", "", None])
def test_an_image_without_a_name_of_its_own_is_not_cached(scopes: Scopes, name: Any) -> None:
    """An image without a name of its own is not cached, whichever process numbered it."""
    where = PlaceholderRange(offset=8, length=8)
    feature = MultiModalFeatureSpec(None, "image", name, where, name)
    assert keys_of(scopes, mm_features=[feature]) is None


def test_one_name_of_two_modalities_is_two(scopes: Scopes) -> None:
    """An image and a sound of the same name have different keys."""
    where = PlaceholderRange(offset=8, length=8)
    keys = {
        keys_of(scopes, mm_features=[MultiModalFeatureSpec(None, kind, "one", where, "one")])
        for kind in ("image", "audio")
    }
    assert len(keys) == 2


def test_files_whose_times_were_set_back_are_read_again(
    scopes: Scopes, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that were written a moment ago are not taken for old ones, whatever time they have."""
    reads: list[Path] = []

    def counted(place: Path) -> Any:
        reads.append(place)
        return files.facts_of(place)

    monkeypatch.setattr(adapters, "facts_of", counted)
    monkeypatch.setattr(adapters, "RACY_NS", 3600 * 10**9)
    for file in adapter.iterdir():
        os.utime(file, ns=(1, 1))
    for number in range(1, 4):
        keys_of(scopes, lora_request=lora(adapter, number=number))
    assert len(reads) == 3
