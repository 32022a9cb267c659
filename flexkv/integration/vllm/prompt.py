"""The namespace of a vLLM request: everything besides its tokens on which its KV depends."""

from __future__ import annotations

import json
import re
from typing import Any

from flexkv.index.keys import Scope
from flexkv.integration.vllm.adapters import Adapters

_COUNTED = re.compile(r"renderer\d+-mm-\d+-")
"""How vLLM names an image whose content it does not hash: by a counter of its process."""
_NOT_WEIGHTS = ("lora_int_id", "load_inplace")
"""Fields of a `LoRARequest` that differ between processes for the same adapter."""


class Scopes:
    """The namespaces of one engine's requests."""

    def __init__(self, names_media: bool = True, lora: str = "") -> None:
        """Store what holds for all requests.

        Args:
            names_media: whether vLLM names images and sounds by their content.
            lora: how the engine applies adapters.
        """
        self._names_media, self._lora = names_media, lora
        self.adapters = Adapters()

    def parts_of(self, request: Any) -> tuple[str, ...] | None:
        """Return a request's LoRA adapter and `cache_salt`; None for one that cannot be cached.

        May wait for a quarter of a second for an adapter's files, so it should be called once for
        each request.

        Args:
            request: vLLM's `Request`.
        """
        parts: tuple[str, ...] = ()
        if (lora := getattr(request, "lora_request", None)) is not None:
            if (facts := self.adapters.facts(lora)) is None:
                return None
            parts += ("lora", _text([self._lora, _told_of(lora), facts]))
        if (salt := getattr(request, "cache_salt", None)) is not None:
            parts += ("salt", str(salt))
        return parts

    def scope_of(self, request: Any, parts: tuple[str, ...] | None) -> Scope | None:
        """Return a request's namespace; None for one that cannot be cached.

        Images and sounds become extra keys of their placeholder tokens.

        Args:
            request: vLLM's `Request`.
            parts: what `parts_of` returned for it.
        """
        if parts is None or getattr(request, "prompt_embeds", None) is not None:
            return None
        extras = []
        for feature in getattr(request, "mm_features", None) or ():
            name = feature.identifier
            if not self._names_media or not name or _COUNTED.search(str(name)):
                return None
            text = json.dumps([getattr(feature, "modality", ""), str(name)])
            first = feature.mm_position.offset
            extras.append((first, first + feature.mm_position.length, text))
        return Scope(parts, tuple(extras))


def features_of(request: Any) -> int:
    """Return how many images and sounds a request has; streamed input may add some."""
    return len(getattr(request, "mm_features", None) or ())


def _told_of(lora: Any) -> dict[str, Any]:
    """Return all that a `LoRARequest` says about the adapter, in any version of vLLM."""
    names = getattr(lora, "__struct_fields__", None) or sorted(vars(lora))
    return {name: getattr(lora, name) for name in names if name not in _NOT_WEIGHTS}


def _text(facts: Any) -> str:
    return json.dumps(facts, sort_keys=True, default=str)
