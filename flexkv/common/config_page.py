"""The page `docs/configuration.md`, written from the definitions of the keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flexkv.common.config import CacheConfig, ModelConfig, Settings
from flexkv.common.config_keys import facts_of

INTRODUCTION = """\
# Configuration

<!-- Written by `python -m flexkv.settings > docs/configuration.md`; edit the definitions in
`flexkv/common/config*.py` instead. -->

Three ways to configure the cache:

- in code: `CacheConfig(tokens_per_block=16, cpu_cache_gb=32)`;
- in a file, named by `FLEXKV_CONFIG_PATH`: YAML (`.yaml`, `.yml`), or JSON with `//` comments. The
  cache's keys stand at the top level or under `cache_config`;
- in the environment: every key but the model's as `FLEXKV_<KEY>`, in capitals. An empty variable
  counts as not set.

A file outranks the environment, which outranks the defaults. `flexkv.settings.load_settings()` reads
all three. An unknown key is an error that names the nearest known one. An older name works, and
warns; it and its newer name together are an error. A key that needs a part of the system that is
not built yet is accepted and checked, and refused when it is enabled and the engine starts.

1 MB is 1024² bytes, 1 GB is 1024³. The size of a tier is given in blocks or in GB; both together
must agree.
"""

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("The process: `Settings`, top level of a file", Settings),
    ("The cache: `CacheConfig`", CacheConfig),
    ("The model: `ModelConfig`, in code only", ModelConfig),
)


def configuration_page() -> str:
    """Give the whole page as Markdown."""
    return INTRODUCTION + "".join(
        f"\n## {title}\n\n" + "\n".join(_table(model)) + "\n" for title, model in SECTIONS
    )


def _table(model: type[BaseModel]) -> Iterator[str]:
    yield "| key | default | unit | meaning |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        if name != "cache_config":
            unit = facts_of(field).unit
            yield f"| `{name}` | {_default(field)} | {unit} | {' '.join(_meaning(field))} |"


def _default(field: FieldInfo) -> str:
    if shown := facts_of(field).shown_default:
        return shown
    if field.is_required():
        return "required"
    return _value(field.default)


def _value(value: Any) -> str:
    if value in (None, (), ""):
        return "unset" if value != "" else "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _meaning(field: FieldInfo) -> Iterator[str]:
    facts = facts_of(field)
    yield field.description or ""
    if get_origin(field.annotation) is Literal and len(choices := get_args(field.annotation)) > 1:
        yield f"One of {', '.join(f'`{choice}`' for choice in choices)}."
    if facts.variables:
        yield f"Environment: {', '.join(f'`{name}`' for name in facts.variables)}."
    if facts.old:
        yield f"Older name: {', '.join(f'`{name}`' for name in facts.old)}."
    if facts.retired:
        yield f"Retired: {facts.retired}."
    if facts.part:
        built = " or ".join(_value(value) for value in facts.built)
        yield f"Only {built} is served: {facts.part.rstrip(',')} is not built yet."
