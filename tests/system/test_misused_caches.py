"""Tests of KV caches that do not fit the model: each is refused, and nothing is registered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexkv.common.config import ModelConfig
from flexkv.common.errors import ConfigError, FlexKVError
from flexkv.kvmanager import KVManager

from .conftest import DEVICE_BLOCKS, MODEL, PER_BLOCK, cache_config, kv_caches, slots_of
from .test_misuse import refused

PROMPT = np.arange(4 * PER_BLOCK)
SLOTS = slots_of(range(4))
SHAPE = (2, DEVICE_BLOCKS, PER_BLOCK, MODEL.num_kv_heads, MODEL.head_size)


def _first(change: Callable[[np.ndarray[Any, Any]], Any]) -> list[Any]:
    """Return KV caches whose first layer is changed."""
    caches: list[Any] = list(kv_caches())
    caches[0] = change(caches[0])
    return caches


def _read_only(layer: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    layer.flags.writeable = False
    return layer


_shared = kv_caches()
_BIG = np.zeros((2, 2 * DEVICE_BLOCKS, *SHAPE[2:]), np.float16)

CACHES_WRONG: dict[str, Any] = {
    "none": None, "text": "abc", "number": 5, "empty list": [], "empty dict": {},
    "one array": np.zeros((3, *SHAPE), np.float16), "one tensor": torch.zeros(3, *SHAPE),
    "generator": (each for each in kv_caches()), "set": {1, 2, 3},
    "too few": kv_caches()[:2], "too many": [*kv_caches(), *kv_caches()[:1]],
    "of none": [None, None, None], "of texts": ["a", "b", "c"], "of lists": [[1], [2], [3]],
    "int16": [layer.view(np.int16) for layer in kv_caches()],
    "torch int16": [torch.zeros(SHAPE, dtype=torch.int16)] * 3,
    "bfloat16": [torch.zeros(SHAPE, dtype=torch.bfloat16) for _ in range(3)],
    "float32": [np.zeros(SHAPE, np.float32) for _ in range(3)],
    "one float32": _first(lambda layer: layer.astype(np.float32)),
    "one int16": _first(lambda layer: layer.view(np.int16)),
    "raw bytes of another length": [layer.view(np.uint8) for layer in kv_caches()],
    "objects": [np.zeros(SHAPE, object) for _ in range(3)],
    "one of objects": _first(lambda layer: layer.astype(object)),
    "structures": [np.zeros(SHAPE, [("a", np.int8), ("b", np.int8)]) for _ in range(3)],
    "other heads": [np.zeros((*SHAPE[:3], 3, 8), np.float16) for _ in range(3)],
    "other tokens": [np.zeros((2, 64, 8, 2, 8), np.float16) for _ in range(3)],
    "no blocks": [np.zeros((2, 0, *SHAPE[2:]), np.float16) for _ in range(3)],
    "other block counts": _first(lambda layer: layer[:, :5].copy()),
    "read-only": _first(_read_only),
    "broadcast": _first(lambda layer: np.broadcast_to(layer[:, :1], SHAPE)),
    "backwards": _first(lambda layer: layer[:, ::-1]),
    "scattered": _first(lambda layer: np.zeros((*SHAPE, 2), np.float16)[..., 0]),
    "every other token": _first(lambda layer: np.zeros((2, 64, 8, 2, 8), np.float16)[:, :, ::2]),
    "meta": [torch.zeros(SHAPE, dtype=torch.float16, device="meta") for _ in range(3)],
    "sparse": [torch.zeros(SHAPE, dtype=torch.float16).to_sparse() for _ in range(3)],
    "the same tensor": [_shared[0], _shared[0], _shared[1]],
    "the same tensor, by names": {"a": _shared[0], "b": _shared[1], "c": _shared[0]},
    "the same memory": [_shared[0], _shared[1], _shared[1][:, :, :, :, :]],
    "overlapping": [_BIG[:, :DEVICE_BLOCKS], _BIG[:, 3 : DEVICE_BLOCKS + 3], _shared[0]],
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES_WRONG)
def test_kv_caches_are_those_of_the_model(tmp_path: Path, name: str) -> None:
    """Invalid KV caches are refused by name; then valid ones can be registered."""
    manager = KVManager(MODEL, cache_config(tmp_path, num_ssd_blocks=0, ssd_cache_dir=()))
    manager.start()
    try:
        with pytest.raises(FlexKVError) as caught:
            manager.register_kv_caches(CACHES_WRONG[name])
        if name != "meta":  # there is no adapter for such a device
            assert isinstance(caught.value, ConfigError)
            assert caught.value.field.startswith("kv_caches"), caught.value
        assert not manager.is_ready()
        for wrong in ("0", None, 1.5, -1, 1, True):
            refused("tp_rank", lambda wrong=wrong: manager.register_kv_caches(  # type: ignore[misc]
                kv_caches(), tp_rank=wrong))  # fmt: skip
        refused("layout", lambda: manager.register_kv_caches(kv_caches(), layout="diagonal"))
        manager.register_kv_caches(kv_caches(), tp_rank=np.int64(0))
        assert manager.is_ready()
    finally:
        manager.shutdown()


@pytest.mark.parametrize(
    ("dtype", "caches"),
    [
        ("float16", [np.zeros(SHAPE, np.float16) for _ in range(3)]),
        ("float16", [np.zeros(SHAPE, "V2") for _ in range(3)]),
        ("bfloat16", [np.zeros(SHAPE, np.uint16) for _ in range(3)]),
        ("bfloat16", [torch.zeros(SHAPE, dtype=torch.bfloat16) for _ in range(3)]),
        ("float8_e4m3fn", [torch.zeros(SHAPE, dtype=torch.uint8) for _ in range(3)]),
        ("float8_e5m2", [np.zeros(SHAPE, np.int8) for _ in range(3)]),
        ("int8", [torch.zeros(SHAPE, dtype=torch.int8) for _ in range(3)]),
        # The layers of one block are neighbours, as some engines keep them.
        ("float16", list(np.zeros((DEVICE_BLOCKS, 3, 2, *SHAPE[2:]), np.float16).swapaxes(0, 1))),
        ("float16", [np.zeros((2, 2 * DEVICE_BLOCKS, *SHAPE[2:]), np.float16)[:, ::2]] * 0
         + [np.zeros((2, 2 * DEVICE_BLOCKS, *SHAPE[2:]), np.float16)[:, ::2] for _ in range(3)]),
    ],
)  # fmt: skip
def test_views_that_say_what_they_are_serve(tmp_path: Path, dtype: str, caches: list[Any]) -> None:
    """The model's dtype, raw items of its size, and any strides that keep a block together work."""
    model = ModelConfig(num_layers=3, num_kv_heads=2, head_size=8, dtype=dtype)
    manager = KVManager(model, cache_config(tmp_path, num_ssd_blocks=0, ssd_cache_dir=()))
    manager.start()
    try:
        manager.register_kv_caches(caches)
        (put,) = manager.wait(manager.put_async(PROMPT, SLOTS)).values()
        assert put.return_mask.all()
    finally:
        manager.shutdown()
