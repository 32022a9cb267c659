"""The namespace of a vLLM request: what besides its tokens its KV hangs on."""

from __future__ import annotations

from typing import Any

from flexkv.index.keys import Scope


def scope_of(request: Any) -> Scope | None:
    """Give a request's namespace; None for one that cannot be cached.

    LoRA adapters and `cache_salt` are namespaces; images and sounds are keys of the placeholder
    tokens that they stand behind.

    Args:
        request: vLLM's `Request`.
    """
    if getattr(request, "prompt_embeds", None) is not None:
        return None
    parts = []
    if (lora := getattr(request, "lora_request", None)) is not None:
        parts.append(f"lora:{lora.lora_name}:{lora.lora_path}")
    if salt := getattr(request, "cache_salt", None):
        parts.append(f"salt:{salt}")
    extras = []
    for feature in getattr(request, "mm_features", None) or ():
        first = feature.mm_position.offset
        extras.append((first, first + feature.mm_position.length, str(feature.identifier)))
    return Scope(tuple(parts), tuple(extras))


def features_of(request: Any) -> int:
    """Count a request's images and sounds: those of a session become more."""
    return len(getattr(request, "mm_features", None) or ())
