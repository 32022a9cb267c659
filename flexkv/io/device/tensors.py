"""Reads what the layout needs from a tensor, without importing the library that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from flexkv.common.config_layers import ITEM_BYTES
from flexkv.common.errors import BackendUnavailableError, ConfigError
from flexkv.common.layout import PagedLayout, TensorSpec, infer_layout, same_blocks
from flexkv.common.space import BlockSpace, Kind

KVCaches: TypeAlias = Mapping[str, Any] | Sequence[Any]
"""The per-layer tensors of one rank: a dict in layer order, or a list."""


def describe(tensor: Any, field: str = "kv_caches") -> TensorSpec:
    """Return address, shape and strides of a numpy array or a torch tensor.

    Args:
        tensor: owned by the caller; its memory must outlive every use of the result.
        field: the name of the tensor in an error.

    Raises:
        ConfigError: it is neither of them, is not dense, is read-only, or has Python objects.
    """
    if isinstance(tensor, np.ndarray):
        if not tensor.flags.writeable:
            raise ConfigError(field, tensor.shape, "must be writable: gets write into it")
        if tensor.dtype.hasobject:
            raise ConfigError(field, f"dtype {tensor.dtype}", "must be numbers, not Python objects")
        address = tensor.__array_interface__["data"][0]
        return TensorSpec(address, tensor.shape, tensor.strides, tensor.itemsize)
    if not hasattr(tensor, "data_ptr"):
        raise ConfigError(field, type(tensor).__name__, "must be a numpy array or a torch tensor")
    try:
        return spec_of(tensor)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        why = f"must be a dense tensor: {error}"
        raise ConfigError(field, type(tensor).__name__, why) from error


def check_dtype(tensor: Any, wanted: str, field: str) -> None:
    """Check that a tensor's elements have the model's type, or are its raw bytes.

    These count as raw bytes: int8 or uint8 in place of another one-byte type, or the reverse;
    numpy's void; and uint16 for bfloat16, which numpy does not have.

    Raises:
        ConfigError: they have another type, so the model or the tensor is the wrong one.
    """
    dtype = getattr(tensor, "dtype", "")
    name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    raw = ITEM_BYTES[wanted] == ITEM_BYTES.get(name) == 1 and {name, wanted} & {"int8", "uint8"}
    void = name.startswith("void") and getattr(dtype, "names", None) is None
    if name and name != wanted and not (raw or void or (wanted, name) == ("bfloat16", "uint16")):
        why = f"must be {wanted}, the model's dtype, or a view of its raw bytes"
        raise ConfigError(field, f"dtype {name}", why)


def device_of(tensors: Sequence[Any]) -> tuple[str, int]:
    """Return the device that holds all tensors: its kind, "cpu" or "cuda", and its number.

    Raises:
        ConfigError: the tensors are on several devices.
        BackendUnavailableError: there is no adapter for this kind of device.
    """
    places = [_place(tensor) for tensor in tensors]
    for number, place in enumerate(places):
        if place[0] not in ("cpu", "cuda"):
            raise BackendUnavailableError(place[0], "FlexKV supports only cpu and cuda devices")
        if place != places[0]:
            where, first = (":".join(map(str, each)) for each in (place, places[0]))
            why = f"kv_caches[0] is on {first}: all tensors of a rank must be on one device"
            raise ConfigError(f"kv_caches[{number}]", where, why)
    return places[0]


def layouts_of(
    spaces: Sequence[BlockSpace], tensors: Sequence[Any], layout: str | None, tp_rank: int
) -> tuple[PagedLayout, ...]:
    """Return where a rank's blocks of each KV group are in its per-layer tensors.

    The tensors are in the order of the model's layers. Those of different groups may overlay each
    other; the layout's name, if one is given, holds for all but states.

    Raises:
        ConfigError: the tensors do not fit the model, or their layout is ambiguous.
    """
    layers = sum(len(space.shapes) for space in spaces)
    if len(tensors) != layers:
        why = f"must have one tensor for each of the {layers} layers"
        raise ConfigError("kv_caches", f"{len(tensors)} tensors", why)
    fields = [f"kv_caches[{i}]" for i in range(layers)]
    specs = [describe(*each) for each in zip(tensors, fields, strict=True)]
    layouts, counts = [], {}
    for space in spaces:
        numbers = space.layers or range(layers)
        for number, dtype in zip(numbers, space.dtypes, strict=True):
            check_dtype(tensors[number], dtype, fields[number])
        own = [specs[number] for number in numbers]
        # A name settles which axis is which; the rows of a state have but one.
        name = None if space.kind is Kind.STATE else layout
        layouts.append(infer_layout(own, space.shapes, name, space.part_of(tp_rank), numbers))
        counts[fields[numbers[0]]] = layouts[-1].num_blocks
    same_blocks(counts)
    return tuple(layouts)


def _place(tensor: Any) -> tuple[str, int]:
    device = getattr(tensor, "device", "cpu")  # numpy has `device` from 2.0 on, as a string
    return ("cpu", 0) if isinstance(device, str) else (device.type, device.index or 0)


def spec_of(tensor: Any) -> TensorSpec:
    """Return address, shape and strides of a torch tensor on any device."""
    itemsize = tensor.element_size()
    return TensorSpec(
        address=tensor.data_ptr(),
        shape=tuple(tensor.shape),
        strides_bytes=tuple(stride * itemsize for stride in tensor.stride()),
        itemsize=itemsize,
    )


def kv_cache_list(kv_caches: KVCaches) -> list[Any]:
    """Return the per-layer tensors in the order of the layers.

    A mapping from layer names, as engines keep it, is read in insertion order.

    Raises:
        ConfigError: it is neither a mapping nor a sequence, or is empty.
    """
    if isinstance(kv_caches, Mapping):
        layers = list(kv_caches.values())
    elif isinstance(kv_caches, Sequence) and not isinstance(kv_caches, str | bytes):
        layers = list(kv_caches)
    else:
        raise ConfigError("kv_caches", type(kv_caches).__name__, "must be a dict or list of arrays")
    if not layers:
        raise ConfigError("kv_caches", kv_caches, "must have at least one layer")
    return layers
