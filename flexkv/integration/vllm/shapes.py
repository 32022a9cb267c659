"""The shapes of an engine's layers, from vLLM's specs of their caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flexkv.common.config_layers import ITEM_BYTES, LayerGroup, dtype_name
from flexkv.common.errors import ConfigError

FULL = ("FullAttentionSpec", "MLAAttentionSpec", "SinkFullAttentionSpec")
KINDS = {
    **dict.fromkeys(FULL, "full"),
    "SlidingWindowSpec": "sliding_window",
    "SlidingWindowMLASpec": "sliding_window",
    "ChunkedLocalAttentionSpec": "chunked",
    "MambaSpec": "state",
}
"""FlexKV's kind of each of vLLM's specs that is served. A class that is derived from one of them
may keep something else, so it is not served unless it is listed itself."""


class Span(NamedTuple):
    """Consecutive layers of one shape in one group."""

    layers: tuple[str, ...]
    shape: LayerGroup
    is_opaque: bool
    state: str = ""
    """The kind, shapes and dtypes of their states: other ones may have as many bytes."""


class Source(NamedTuple):
    """Where the blocks of one of FlexKV's groups are among those of one of vLLM's.

    They are every `step`-th block from number `first` on. Usually these are all blocks. But if the
    blocks of vLLM's group are smaller than those of the chain, a block of the chain covers `step`
    of them. Then all that are the first in their block of the chain form one group, all that are
    the second form another, and so on. So each has its own device block, and a prefix needs exactly
    those that the engine keeps.
    """

    engine_id: int
    first: int = 0
    step: int = 1

    def of(self, ids: Sequence[Sequence[int]]) -> Sequence[int]:
        """Return the group's device blocks; `ids` has those of a request, by vLLM's groups."""
        blocks = ids[self.engine_id]
        return blocks if self.step == 1 else blocks[self.first :: self.step]


def sources_of(engine_id: int, spec: Any, chain_tokens: int) -> Iterator[Source]:
    """Yield the groups of FlexKV that one of vLLM's groups becomes.

    Groups whose blocks no prefix needs are left out.
    """
    step = max(1, chain_tokens // int(spec.block_size))
    sources = [Source(engine_id, first, step) for first in range(step)]
    match KINDS[type(spec).__name__]:
        case "state":
            yield sources[-1]
        case "sliding_window" if step > 1:
            yield from (source for source in sources if window_of(spec, source) > 1)
        case _:
            yield from sources


def refusal(layer: str, spec: Any, why: str) -> ConfigError:
    """Return the error which says that a layer is not served, and why."""
    told = f"FlexKV does not serve the layer {layer}: {why}"
    return ConfigError("kv_cache_spec", type(spec).__name__, told)


def layer_specs(group: Any) -> Iterator[tuple[str, Any]]:
    """Yield the layers of a group with the specs that are known of them."""
    several = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    if several:
        yield from several.items()
    else:
        name = group.layer_names[0] if group.layer_names else "no layer"
        yield name, group.kv_cache_spec


class Shapes:
    """The shapes of an engine's layers, over all its ranks."""

    def __init__(
        self, config: Any, vllm_config: Any, served: Mapping[int, Any], chain: int
    ) -> None:
        """Take vLLM's configurations, the specs of the groups that are served, and the chain."""
        self._config, self._served = config, served
        self._per_block = int(served[chain].block_size)
        self._ranks = int(vllm_config.parallel_config.tensor_parallel_size)
        self._model = vllm_config.model_config

    def spans(self, group: int, source: Source) -> Iterator[Span]:
        """Yield the layers of one of FlexKV's groups.

        Raises:
            ConfigError: the size or the meaning of a layer's pages is unknown.
        """
        number = source.engine_id
        told, first = self._config.kv_cache_groups[number], self._served[number]
        pages = self._pages(told)
        parts = self._parts(first, are_alike=len(pages) == 1)
        for at, (layers, page_bytes) in enumerate(pages):
            common = {"kv_group": group, **self._common(first, source, len(layers))}
            if at == 0:
                shape = _shape(common, first, parts)
            elif common["kind"] == "state":
                raise refusal(
                    layers[0], first, "its state differs in shape from those of its group"
                )
            else:
                common["compress_ratio"] = source.step
                shape = _opaque(common, first, parts, layers[0], page_bytes)
            yield Span(layers, shape, at > 0, _state(first))

    def _pages(self, told: Any) -> list[tuple[tuple[str, ...], int]]:
        """Return the layers of a group by shape, each with the bytes of a page.

        The bytes are 0 for the first shape, whose spec is known. Layers that share the cache of
        another one have no place, and are left out.
        """
        names = set(told.layer_names)
        placed = [
            (tuple(tensor.layers), min(int(tensor.layer_stride), int(tensor.block_stride)))
            for tensor in getattr(self._config, "kv_cache_tensors", ())
            if names.issuperset(getattr(tensor, "layers", ("",)))
        ]
        if placed:
            return [(placed[0][0], 0), *placed[1:]]
        specs = [spec for _, spec in layer_specs(told)]
        if any(spec != specs[0] for spec in specs):
            raise refusal(told.layer_names[0], specs[0], "layers of its group differ in shape")
        return [(tuple(told.layer_names), 0)]

    def _common(self, spec: Any, source: Source, layers: int) -> dict[str, Any]:
        tokens, kind = int(spec.block_size) * source.step, KINDS[type(spec).__name__]
        per_vector = 1 if kind == "state" else int(getattr(spec, "tokens_per_state", 1))
        return {
            "num_layers": layers,
            "kind": kind,
            "window": window_of(spec, source),
            "tokens_per_block": None if tokens == self._per_block else tokens,
            "compress_ratio": 1 if kind == "state" else per_vector * source.step,
        }

    def _parts(self, spec: Any, are_alike: bool) -> int:
        """Return into how many different parts the ranks divide the layers of a group.

        Each rank has a part of its own, unless several ranks are known to have the same bytes.
        """
        if KINDS[type(spec).__name__] == "state":
            return 1 if getattr(spec, "tp_replicated", False) else self._ranks
        if _heads_of(spec) > 1:
            return self._ranks
        if (copies := int(getattr(self._config, "kv_tp_replicas", 1))) > 1:
            return self._ranks // copies
        if not are_alike:
            return self._ranks
        if "MLA" in type(spec).__name__:
            return 1
        if (shards := getattr(spec, "max_tp_shards", None)) is not None:
            return min(int(shards), self._ranks)
        has_others = len(self._config.kv_cache_groups) > 1
        return self._ranks if has_others else min(self._model.get_total_num_kv_heads(), self._ranks)


def _shape(common: dict[str, Any], spec: Any, parts: int) -> LayerGroup:
    """Return the shape of layers whose spec is known."""
    if common["kind"] == "state":
        content = int(spec.state_content_size_bytes)
        return LayerGroup(**common, num_kv_heads=parts, state_bytes=content)
    dtype, content = dtype_name(spec.dtype), _content_bytes(spec)
    item, kv_dim, size = ITEM_BYTES[dtype], 2, int(spec.head_size)
    if content != 2 * size * item:  # packed, or K and V of different sizes, or MLA
        kv_dim, size = 1, content // item
    if content % item:
        dtype, size = "uint8", content
    return LayerGroup(
        **common, num_kv_heads=_heads_of(spec) * parts, head_size=size, dtype=dtype, kv_dim=kv_dim
    )


def _state(spec: Any) -> str:
    """Return what distinguishes a state from others of as many bytes; "" for other kinds."""
    if KINDS[type(spec).__name__] != "state":
        return ""
    kind = getattr(spec.mamba_type, "name", spec.mamba_type)
    return f"{kind} {[*map(list, spec.shapes)]} {[*map(dtype_name, spec.dtypes)]}"


def _opaque(
    common: dict[str, Any], spec: Any, parts: int, layer: str, page_bytes: int
) -> LayerGroup:
    """Return the shape of layers of which only the number of bytes in a page is known."""
    tokens = int(spec.block_size)
    if page_bytes % tokens:
        why = f"its pages of {page_bytes} bytes are no multiple of their {tokens} tokens"
        raise refusal(layer, spec, why)
    size = page_bytes // tokens
    return LayerGroup(**common, num_kv_heads=parts, head_size=size, dtype="uint8", kv_dim=1)


def _heads_of(spec: Any) -> int:
    """Return the number of heads that one rank stores."""
    return int(getattr(spec, "num_heads", None) or spec.num_kv_heads)


def window_of(spec: Any, source: Source | None = None) -> int:
    """Return the tokens of a window or chunk, with those that vLLM keeps beyond a window.

    If a block of the chain covers several of the group's, a window needs one of these if it reaches
    its last token. FlexKV asks whether it reaches the last token of the chain's block instead, so
    the window of such a source is shorter by the tokens between the two.
    """
    match KINDS[type(spec).__name__]:
        case "sliding_window":
            kept = int(spec.sliding_window) + int(getattr(spec, "extra_retained_tokens", 0))
            behind = 0 if source is None else source.step - 1 - source.first
            return kept - behind * int(spec.block_size)
        case "chunked":
            return int(spec.attention_chunk_size)
    return 0


def _content_bytes(spec: Any) -> int:
    """Return the bytes of one head of one token: K and V, or what the backend packs."""
    if (told := getattr(spec, "state_content_size_bytes", None)) is not None:
        return int(told)
    size_v = getattr(spec, "head_size_v", None)
    if size_v is None:
        size_v = 0 if "MLA" in type(spec).__name__ else spec.head_size
    return int(spec.head_size + size_v) * ITEM_BYTES[dtype_name(spec.dtype)]
