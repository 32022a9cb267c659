"""The KV groups of an engine, from vLLM's `KVCacheConfig`: which are served, and what they are.

vLLM puts layers whose blocks it keeps and finds together into a group. Groups are judged by the
kind of their cache, whatever the model's configuration says:

    kind of cache (vLLM's spec)                            kept of a prefix
    FullAttention, MLAAttention, SinkFullAttention         every block
    SlidingWindow, SlidingWindowMLA                        the blocks of its last window
    ChunkedLocalAttention                                  the blocks of its last chunk
    Mamba, with mamba_cache_mode "align"                   the state at its end

FlexKV's group 0, the prefix chain, is the full-attention group with the smallest blocks. In a model
without full attention it is, of the windows with the smallest blocks, the longest. The others
follow in vLLM's order. A model with only chunks has no chain: vLLM counts all chunks but a prompt's
last one as computed, even if nothing has ever computed them. A group whose blocks are smaller than
those of group 0 becomes several of FlexKV's groups: see `Source`. All groups overlay one
allocation: a block id belongs to one group at a time.

Some groups are left out, since vLLM itself does not cache prefixes of them, and makes their content
anew after each hit, whether the hit is its own or FlexKV's:

    CircularBuffer                       it holds the tokens of one compressed state that is not
                                         complete yet; there are none at the end of a hit
    SlidingWindowMLA, bounded_replay     vLLM computes the last window of each hit again for it

This is known of these two kinds only. Another kind without prefixes is refused: it may keep its
content somewhere else, as HiSparse does.

Both sides of the connector must come to the same result. But if the layers of a group differ in
shape, the scheduler's side has only the first layer's spec. The sizes of the other layers' pages
follow from the placement of the tensors; the meaning of their bytes is unknown (*opaque* layers).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.kv_cache_interface import FullAttentionSpec

from flexkv.common.config_layers import ITEM_BYTES, LayerGroup
from flexkv.common.config_model import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.space import GROUPS_MAX
from flexkv.integration.vllm.shapes import (
    KINDS,
    Shapes,
    Source,
    Span,
    layer_specs,
    refusal,
    sources_of,
    window_of,
)

FAILS_WHOLE = hasattr(sys.modules[KVConnectorBase_V1.__module__], "KVConnectorTransferResults")
"""Whether this version of vLLM can be told that a load failed as a whole."""
MIXED_STATES = ("MAMBA2",)
"""vLLM's names of the kinds of states for which tests show that a load may continue a prefix that
the device has. A prompt with other states is loaded only if the device has nothing of it."""
LEFT_OUT = ("CircularBufferSpec", "SlidingWindowMLASpec")
"""Specs whose groups are left out if vLLM does not cache prefixes of them."""
WHY_REFUSED = {
    "CrossAttentionSpec": "cross attention depends on more than the tokens before",
    "EncoderOnlyAttentionSpec": "encoder layers attend in both directions",
    "HiSparseHotSpec": "HiSparse has a host cache of its own",
    "HiSparseResidentSpec": "HiSparse has a host cache of its own",
    "RSWASpec": "it forgets blocks in the middle of a prefix",
    "HiddenStateCacheSpec": "it keeps hidden states, not KV",
}
"""Why some specs are refused."""


@dataclass(frozen=True)
class EngineGroups:
    """The KV groups of an engine.

    Attributes:
        spans: all layers that are transferred, in FlexKV's order of layers.
        sources: where the blocks of each of FlexKV's groups are in vLLM's lists.
        names: vLLM's kind of each of FlexKV's groups, such as "sliding_window".
        tokens_per_block: of group 0.
        alignment_tokens: every hit ends on a multiple of it.
        drops_last: whether the engine computes the last block of each hit again, for its drafts.
        retained_tokens: the engine keeps what a hit needs once in this many tokens; 0: only where a
            prompt ends.
        num_blocks: how many blocks the device has; 0 if it was not told.
        hash_tokens: the tokens of each of the engine's own hashes.
        mixes: whether what is loaded may continue what the device has.
        engine_tokens: the tokens of a block of each of vLLM's groups; 0 for one that is left out.
    """

    spans: tuple[Span, ...]
    sources: tuple[Source, ...]
    names: tuple[str, ...]
    tokens_per_block: int
    alignment_tokens: int
    drops_last: bool
    retained_tokens: int
    num_blocks: int
    hash_tokens: int
    mixes: bool
    engine_tokens: tuple[int, ...]

    @property
    def are_several(self) -> bool:
        """Return whether there is more than one."""
        return len(self.sources) > 1

    @property
    def engine_ids(self) -> tuple[int, ...]:
        """Return vLLM's indices of the groups that are served, ascending."""
        return tuple(sorted({source.engine_id for source in self.sources}))

    @property
    def chain(self) -> int:
        """Return vLLM's index of FlexKV's group 0."""
        return self.sources[0].engine_id

    @property
    def fail_whole(self) -> bool:
        """Return whether a load that comes short has failed as a whole.

        vLLM accepts a report of single blocks that were not loaded only if it has one group. And a
        window that ends before such a block needs blocks that the load does not bring.
        """
        return len(self.engine_tokens) > 1 or self.shape(0).kind != "full"

    @property
    def have_states(self) -> bool:
        """Return whether any of them keeps states."""
        return any(span.shape.kind == "state" for span in self.spans)

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """Return the shapes of the layers, in their order."""
        return tuple(span.shape for span in self.spans)

    @property
    def layers(self) -> tuple[str, ...]:
        """Return vLLM's names of the layers, in FlexKV's order."""
        return tuple(name for span in self.spans for name in span.layers)

    @property
    def facts(self) -> tuple[str, ...]:
        """Return what the name of the model covers of the layers: their order and their states."""
        return *self.layers, *(span.state for span in self.spans if span.state)

    def written(self, ids: Sequence[Sequence[int]], computed: int = 0) -> Iterator[int]:
        """Yield the blocks of all of vLLM's groups but the chain that the next step may write.

        Args:
            ids: all blocks of a request, or its new ones, by vLLM's groups.
            computed: how many of their tokens are computed already.
        """
        for number, (blocks, tokens) in enumerate(zip(ids, self.engine_tokens, strict=True)):
            if number != self.chain:
                yield from blocks[computed // tokens if tokens else 0 :]

    def shape(self, group: int) -> LayerGroup:
        """Return the shape of the first layers of one of FlexKV's groups."""
        return next(shape for shape in self.layer_groups if shape.kv_group == group)

    def block_tokens(self, group: int) -> int:
        """Return the tokens of a block of one of FlexKV's groups."""
        return self.shape(group).tokens_per_block or self.tokens_per_block

    def fit(self, plain: ModelConfig) -> bool:
        """Return whether all layers are in one group and have this model's shape."""
        shape, *others = self.layer_groups
        names = "num_layers", "num_kv_heads", "head_size", "kv_dim"
        is_same = all(getattr(shape, name) == getattr(plain, name) for name in names)
        same_items = ITEM_BYTES[shape.dtype or plain.dtype] == ITEM_BYTES[plain.dtype]
        is_plain = shape.compress_ratio == 1 and not self.fail_whole
        return not others and is_same and same_items and is_plain

    def model(self, tp_size: int, use_mla: bool, model_id: str) -> ModelConfig:
        """Return the configuration of the model, with this name and number of ranks."""
        first = self.layer_groups[0]
        return ModelConfig(
            num_layers=len(self.layers),
            num_kv_heads=first.num_kv_heads,
            head_size=first.head_size,
            dtype=first.dtype or "uint8",
            use_mla=use_mla and all(shape.num_kv_heads == 1 for shape in self.layer_groups),
            kv_dim=first.kv_dim or 2,
            tp_size=tp_size,
            layer_groups=self.layer_groups,
            model_id=model_id,
        )


def groups_of(kv_cache_config: Any, vllm_config: Any) -> EngineGroups | None:
    """Return the KV groups of an engine; None if vLLM does not tell them.

    Args:
        kv_cache_config: vLLM's `KVCacheConfig`, of a worker or of the scheduler.
        vllm_config: vLLM's `VllmConfig`.

    Raises:
        ConfigError: FlexKV does not serve one of them; the error names a layer and why.
    """
    told = getattr(kv_cache_config, "kv_cache_groups", None)
    if told is None:
        return None
    served = {
        number: _first_spec(group)
        for number, group in enumerate(told)
        if getattr(group, "enable_kv_transfer", True)
    }
    for number, spec in served.items():
        _check(told[number], spec)
    served = {number: spec for number, spec in served.items() if not _is_left_out(spec)}
    chain = _chain_of(told, served)
    is_full = KINDS[type(served[chain]).__name__] == "full"
    if not FAILS_WHOLE and (len(told) > 1 or not is_full):
        what = "a model without full attention needs"
        if len(told) > 1:
            what = "several KV groups need"
        why = f"FlexKV: {what} vLLM 0.32 or later, where a load may fail as a whole"
        raise ConfigError("kv_cache_groups", len(told), why)
    tokens = int(served[chain].block_size)
    alignment = lcm(*(int(spec.block_size) for spec in served.values()))
    hits = int(getattr(kv_cache_config, "cache_hit_alignment_tokens", None) or 1)
    if len(served) == 1:
        alignment = lcm(alignment, hits)
    _check_blocks(told, served, tokens, alignment, hits)
    order = [chain, *(number for number in served if number != chain)]
    sources = [source for each in order for source in sources_of(each, served[each], tokens)]
    if len(sources) > GROUPS_MAX:
        why = f"FlexKV: must be at most {GROUPS_MAX}, where a group counts once for each of its"
        why += " blocks in a block of the prefix"
        raise ConfigError("kv_cache_groups", len(sources), why)
    shapes = Shapes(kv_cache_config, vllm_config, served, chain)
    spans = [span for group, each in enumerate(sources) for span in shapes.spans(group, each)]
    retained = getattr(kv_cache_config, "prefix_cache_retention_interval", 0)
    return EngineGroups(
        tuple(spans),
        tuple(sources),
        tuple(_name(served[source.engine_id]) for source in sources),
        tokens,
        alignment,
        _drops_last(vllm_config) or any(getattr(g, "is_eagle_group", False) for g in told),
        alignment if retained is None else int(retained),
        int(getattr(kv_cache_config, "num_blocks", 0)),
        int(getattr(kv_cache_config, "hash_block_size", None) or tokens),
        all(_mixes(spec) for spec in served.values()),
        tuple(int(served[n].block_size) if n in served else 0 for n in range(len(told))),
    )


def _chain_of(told: Sequence[Any], served: Mapping[int, Any]) -> int:
    """Return vLLM's index of the group whose blocks are the prefix chain.

    Raises:
        ConfigError: no group can be the chain, or one reaches back further than the chain.
    """
    for wanted in ("full", "sliding_window"):
        # A window of one token holds only the token being computed, so it needs no blocks.
        able = [
            number
            for number, spec in served.items()
            if KINDS[type(spec).__name__] == wanted and window_of(spec) != 1
        ]
        if able:
            break
    else:
        names = ", ".join(type(spec).__name__ for spec in served.values())
        why = "FlexKV: a model with neither full attention nor a window is not served: prefixes "
        why += "are found by the blocks of one of them"
        raise ConfigError("kv_cache_groups", names or "none", why)
    chain = min(able, key=lambda number: (served[number].block_size, -window_of(served[number])))
    for number, spec in served.items():
        if not _covers(served[chain], spec):
            first = told[chain].layer_names[0]
            why = "without full attention, no layer may reach back further than the layers whose "
            why += f"blocks are the prefix, such as {first}"
            raise refusal(told[number].layer_names[0], spec, why)
    return chain


def _covers(chain: Any, spec: Any) -> bool:
    """Return whether a hit needs a group's blocks only where it needs those of the chain, too."""
    is_full = KINDS[type(chain).__name__] == "full"
    return is_full or window_of(chain) >= window_of(spec)


def _mixes(spec: Any) -> bool:
    """Return whether tests have shown that loads may continue what the device has of a group."""
    kind = getattr(spec, "mamba_type", None)
    return KINDS[type(spec).__name__] != "state" or getattr(kind, "name", kind) in MIXED_STATES


def _first_spec(group: Any) -> Any:
    """Return the spec of a group's first layer, which is all that the scheduler's side has."""
    spec = group.kv_cache_spec
    several = getattr(spec, "kv_cache_specs", None)
    return next(iter(several.values())) if several else spec


def _is_left_out(spec: Any) -> bool:
    """Return whether vLLM itself makes the content of a group anew after each hit."""
    name = type(spec).__name__
    if name not in LEFT_OUT or getattr(spec, "prefix_cacheable", True):
        return False
    return name == "CircularBufferSpec" or bool(getattr(spec, "prefix_replay_tokens", 0))


def _name(spec: Any) -> str:
    """Return vLLM's own name of a kind of cache, as in its KV events."""
    module = sys.modules[FullAttentionSpec.__module__]
    kind_of = getattr(module, "get_kv_cache_spec_kind", None)
    return KINDS[type(spec).__name__] if kind_of is None else str(kind_of(spec).value)


# -- what is not served -------------------------------------------------------------------------


def _check(group: Any, first: Any) -> None:
    """Check that one group is served.

    Raises:
        ConfigError: it is not; the error names a layer.
    """
    role = getattr(group, "role", None)
    role = getattr(role, "value", role) or "default"
    if getattr(group, "host_resident", False) or role != "default":
        raise refusal(
            group.layer_names[0], first, "its blocks are in the host memory of the engine"
        )
    kinds = set[str]()
    specs = list(layer_specs(group))
    if all(_is_left_out(spec) for _, spec in specs):
        return
    for layer, spec in specs:
        kind = KINDS.get(type(spec).__name__)
        if kind is None:
            why = WHY_REFUSED.get(type(spec).__name__, "FlexKV does not know this kind of cache")
            raise refusal(layer, spec, why)
        kinds.add(kind)
        _check_spec(layer, spec, kind)
    if len(kinds) > 1:
        raise refusal(
            group.layer_names[0], first, f"its group mixes kinds: {', '.join(sorted(kinds))}"
        )


def _check_spec(layer: str, spec: Any, kind: str) -> None:
    if not getattr(spec, "prefix_cacheable", True):
        raise refusal(layer, spec, "vLLM itself does not cache prefixes of it")
    if getattr(spec, "non_causal", False):
        raise refusal(layer, spec, "it attends to later tokens")
    if kind == "state" and (mode := spec.mamba_cache_mode) != "align":
        why = f"mamba_cache_mode is {mode}; FlexKV needs align, as vLLM has with prefix caching"
        raise refusal(layer, spec, why)
    per_state = getattr(spec, "tokens_per_state", 1)
    if kind != "state" and per_state != int(per_state):
        raise refusal(layer, spec, f"it keeps {1 / per_state} states for each token")
    if kind != "state" and spec.block_size % per_state:
        why = f"its blocks of {spec.block_size} tokens must be whole states of {per_state} tokens"
        raise refusal(layer, spec, why)


def _check_blocks(
    told: Sequence[Any], served: Mapping[int, Any], tokens: int, alignment: int, hits: int
) -> None:
    """Check that the blocks of all groups fit those of the chain.

    Raises:
        ConfigError: a block of some group is neither a multiple of the chain's nor divides it, a
            chunk begins inside a block of the chain, or hits end elsewhere.
    """
    for number, spec in served.items():
        layer, size = told[number].layer_names[0], int(spec.block_size)
        if size % tokens and tokens % size:
            why = f"its blocks have {size} tokens: must be a multiple or a divisor of {tokens}, the"
            raise refusal(layer, spec, f"{why} tokens of a block of the prefix")
        is_chunked = KINDS[type(spec).__name__] == "chunked"
        if is_chunked and size < tokens and spec.attention_chunk_size % tokens:
            why = f"its chunks have {spec.attention_chunk_size} tokens: must be a multiple of"
            raise refusal(layer, spec, f"{why} {tokens}, the tokens of a block of the prefix")
    if alignment % hits:
        why = f"FlexKV: must divide {alignment}: FlexKV's hits end on multiples of that many tokens"
        raise ConfigError("cache_hit_alignment_tokens", hits, why)


def _drops_last(vllm_config: Any) -> bool:
    """Return whether vLLM drops the last block of each hit, since its drafts need its outputs."""
    drafts = getattr(vllm_config, "speculative_config", None)
    asked = getattr(drafts, "use_eagle_block_drop", None) or getattr(drafts, "use_eagle", None)
    return bool(asked and asked())
