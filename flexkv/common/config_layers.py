"""Layers whose KV differs from that of the model's other layers: shapes, types, what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from flexkv.common.config_keys import PlainValues, key
from flexkv.common.space import GROUPS_MAX, Kind

ITEM_BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "int8": 1,
    "uint8": 1,
}
"""Bytes of one element, by the name of its type in torch and numpy."""

SHORT_NAMES = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}


def dtype_name(dtype: object) -> str:
    """Return the name of a torch dtype, a numpy dtype or a string, such as "bfloat16".

    Neither library is imported: a torch dtype prints as `torch.<name>`, a numpy dtype as `<name>`,
    and a numpy scalar class has that name.
    """
    text = dtype.__name__ if isinstance(dtype, type) else str(dtype)
    name = text.removeprefix("torch.")
    name = SHORT_NAMES.get(name, name)
    if name not in ITEM_BYTES:
        raise ValueError(f"unknown element type; must be one of {', '.join(ITEM_BYTES)}")
    return name


DTypeName = Annotated[str, BeforeValidator(dtype_name)]
LAYERS_MAX, HEADS_MAX, RANKS_MAX = 1 << 14, 1 << 16, 1 << 16
"""More layers, heads (or elements of a head), ranks or instances than any model or machine has."""
TOKENS_MAX, STATE_BYTES_MAX = 1 << 30, 1 << 32
"""A longer window than any model's, and a larger state of one layer."""

KindName = Literal["full", "sliding_window", "chunked", "state"]
KINDS: dict[KindName, Kind] = {
    "full": Kind.FULL,
    "sliding_window": Kind.WINDOW,
    "chunked": Kind.CHUNK,
    "state": Kind.STATE,
}
WITH_WINDOW = frozenset[KindName]({"sliding_window", "chunked"})
_ALWAYS_SHOWN = (
    "num_layers", "num_kv_heads", "head_size", "layer_indices", "dtype", "compress_ratio",
)  # fmt: skip


class LayerGroup(PlainValues):
    """Layers of one model with the same KV shape, of the same kind.

    Layer groups with the same `kv_group` are one KV group: their blocks are kept and found
    together. `kind` says which of their blocks a prefix needs: see `flexkv.common.space.Kind`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    kind: KindName = key(
        "full",
        "Which blocks a prefix needs. `full` attention (or MLA): all. `sliding_window`: those that "
        "the window reaches from the next token. `chunked` local attention: those of the chunk "
        "that the next token is in. `state`: the one that ends where the prefix ends.",
    )
    num_layers: int = Field(ge=1, le=LAYERS_MAX, description="Number of layers.")
    window: int = key(
        0,
        "Tokens of the window, the next token included, or of a chunk. Only for these two kinds.",
        ge=0,
        le=TOKENS_MAX,
    )
    state_bytes: int = key(
        0,
        "Bytes of one layer's state on one rank, without padding. Its tensor is int8[blocks, "
        "state_bytes], with any axes of length 1 between. Only for states.",
        ge=0,
        le=STATE_BYTES_MAX,
    )
    num_kv_heads: int = key(
        None,
        "KV heads of a layer, over all TP ranks. For a state: 1 if each rank has the whole state, "
        "tp_size if each has a slice.",
        ge=1,
        le=HEADS_MAX,
        shown_default="required; 1 for a state",
    )
    head_size: int = key(
        None,
        f"Elements of one head; at most {HEADS_MAX} except for a state.",
        ge=1,
        le=STATE_BYTES_MAX,
        shown_default="required; `state_bytes` for a state",
    )
    layer_indices: tuple[Annotated[int, Field(ge=0, lt=LAYERS_MAX, strict=True)], ...] = key(
        (),
        "Which layers of the model these are, from 0. Given for all layer groups or for none.",
        shown_default="the layers behind the previous group's",
    )
    dtype: DTypeName | None = key(
        None,
        "Element type. For a state, only a part of its identity.",
        shown_default="the model's",
    )
    compress_ratio: int = key(1, "Tokens that share one vector.", ge=1, le=HEADS_MAX)
    kv_group: int = key(
        0,
        "Number of the KV group, from 0 without a gap: layers with the same number share blocks. "
        "Group 0 is of kind `full` if any group is, else of kind `sliding_window`. Its blocks are "
        "those of the prefix: all of them are kept and found, whatever its kind.",
        ge=0,
        lt=GROUPS_MAX,
    )
    tokens_per_block: int | None = key(
        None,
        "Tokens of a block: a multiple of the cache's `tokens_per_block`.",
        ge=1,
        le=TOKENS_MAX,
        shown_default="the cache's",
    )
    kv_dim: int | None = key(
        None,
        "Vectors per token and layer: 2 for K and V, or 1.",
        ge=1,
        le=2,
        shown_default="the model's",
    )

    @property
    def is_state(self) -> bool:
        """Return whether a block is a state, and not the KV of some tokens."""
        return self.kind == "state"

    @field_validator("num_kv_heads", "head_size", mode="before")
    @classmethod
    def _of_a_state(cls, value: Any, info: ValidationInfo) -> Any:
        """Return what a state has instead of heads, if the field is left out."""
        if value is not None:
            return value
        if info.data.get("kind") != "state":
            raise ValueError("is required: it has no default")
        return 1 if info.field_name == "num_kv_heads" else info.data.get("state_bytes")

    @field_validator("window")
    @classmethod
    def _has_a_window(cls, window: int, info: ValidationInfo) -> int:
        if (kind := info.data.get("kind")) in WITH_WINDOW and not window:
            raise ValueError(f"must be at least 1 for kind={kind!r}")
        if kind not in WITH_WINDOW and window:
            raise ValueError(f"must be left out for kind={kind!r}, which has no window")
        return window

    @field_validator("state_bytes")
    @classmethod
    def _has_a_state(cls, size_bytes: int, info: ValidationInfo) -> int:
        if (kind := info.data.get("kind")) == "state" and not size_bytes:
            raise ValueError("must be at least 1 for kind='state'")
        if kind != "state" and size_bytes:
            raise ValueError(f"must be left out for kind={kind!r}, which has no state")
        return size_bytes

    @field_validator("head_size")
    @classmethod
    def _is_a_head(cls, size: int, info: ValidationInfo) -> int:
        if info.data.get("kind") != "state" and size > HEADS_MAX:
            raise ValueError(f"must be less than or equal to {HEADS_MAX}")
        if info.data.get("kind") == "state" and size != info.data.get("state_bytes"):
            raise ValueError("must be left out, or be state_bytes, for kind='state'")
        return size

    @field_validator("compress_ratio", "kv_dim")
    @classmethod
    def _is_one_of_a_state(cls, value: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("kind") == "state" and value not in (None, 1):
            raise ValueError("must be left out for kind='state', which has no vectors of tokens")
        return value

    @model_validator(mode="after")
    def _indices_fit(self) -> Self:
        indices = self.layer_indices
        if indices and len(set(indices)) != self.num_layers:
            raise ValueError(
                f"layer_indices must name num_layers={self.num_layers} different layers"
            )
        return self

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Return the fields that `repr` shows, a text from which block keys are derived.

        Fields that came later are shown only if they are set: so the keys of models that do not set
        them stay what they were.
        """
        values = dict(super().__repr_args__())
        defaults = type(self).model_fields
        yield from ((name, values.pop(name)) for name in _ALWAYS_SHOWN)
        yield from (each for each in values.items() if each[1] != defaults[str(each[0])].default)
