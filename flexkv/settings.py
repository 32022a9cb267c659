"""Reads the configuration from its file and the environment: the impure part of configuration.

`python -m flexkv.settings` prints `docs/configuration.md`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import json5
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flexkv.common.config import (
    CacheConfig,
    LayerGroup,
    ModelConfig,
    Settings,
    overruled,
    settings_of,
    variable_keys,
)
from flexkv.common.config_keys import (
    HIDDEN,
    DuplicateKeyError,
    announce,
    check_no_rivals,
    current_names,
    facts_of,
    kind_of,
    nearest,
    old_names,
    without_duplicates,
)
from flexkv.common.config_sizes import SIZE_PAIRS
from flexkv.common.errors import ConfigError
from flexkv.observe.logs import get_logger, obey

log = get_logger(__name__)

PATH_VARIABLE = "FLEXKV_CONFIG_PATH"
FILE_BYTES_MAX = 1 << 20
STORE_OPTIONS = ("endpoint", "bucket", "region", "prefix")
"""Options of a remote store's client, which errors may show by name."""


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings of this process: file over environment over defaults.

    From now on, the log lines of this process have the level and prefix that the settings give.

    Raises:
        ConfigError: the file cannot be read, or a key or value breaks a rule.
    """
    path = environ.get(PATH_VARIABLE)
    file = load_file(Path(path)) if path else {}
    values, variables = _from_environment(environ)
    try:
        settings = settings_of(file, values)
    except ConfigError as error:
        fault = error
    else:
        for name, rival in overruled(values, _flat(file)):
            log.warning(
                "environment_variable_overridden", field=variables[name], by=rival, path=path
            )
        given = settings.model_fields_set
        obey(
            settings.log_level if "log_level" in given else None,
            settings.logging_prefix if "logging_prefix" in given else None,
        )
        return settings
    if fault.field in variables and fault.field not in _flat(file):
        fault = ConfigError(variables[fault.field], fault.value, fault.why)
    raise fault  # raised here it has no context, which would hold the values


def _flat(file: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's keys by their current names, including those under `cache_config`."""
    nested = file.get("cache_config")
    keys = {**file, **(nested if isinstance(nested, Mapping) else {})}
    renames = old_names((Settings, CacheConfig))
    return {renames.get(name, name): value for name, value in keys.items()}


def load_file(path: Path, field: str = PATH_VARIABLE) -> dict[str, Any]:
    """Return the content of a file: YAML by its suffix, else JSON with comments.

    Args:
        path: the file.
        field: the file's name in errors.

    Raises:
        ConfigError: it is missing, cannot be read, or is not an object; a syntax error comes
            with its location.
    """
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(field, str(path), why) from error
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError(field, str(path), f"has more than {FILE_BYTES_MAX} bytes")
    return load_object(content, field, str(path), path.suffix in (".yaml", ".yml"))


def load_object(
    content: bytes, field: str, told: str = "", is_yaml: bool = False
) -> dict[str, Any]:
    """Return the object that a YAML or JSON text holds; an empty YAML text is an empty object.

    Neither the error nor its context has any of the text, which may hold secrets.

    Args:
        content: UTF-8, with or without a byte order mark.
        field: the text's name in errors.
        told: what errors show in place of the text.
        is_yaml: whether it is YAML; otherwise it is JSON with comments.

    Raises:
        ConfigError: it is not an object; a syntax error comes with its location.
    """
    why = ""
    try:
        text = content.decode("utf-8-sig")
        found = yaml.load(text, _Loader) if is_yaml else _json(text)
    except DuplicateKeyError as error:
        why = f"{_name_shown(error.args[0])} occurs twice" + "".join(error.args[1:])
    except _FAULTS as error:
        why = f"syntax: {_fault(error)}"
    del content  # tools that show the variables of a traceback would show it
    if not why:
        if found is None and is_yaml:
            return {}
        if isinstance(found, dict):
            return found
        why = "must contain an object of keys"
    text = found = ""
    raise ConfigError(field, told, why)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses an object that has one key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    place = f" (line {key.start_mark.line + 1})"
                    raise DuplicateKeyError(key.value, place)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _json(text: str) -> Any:
    """Return what a JSON text holds; a text with comments goes to a slower parser."""
    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError):
        return json5.loads(text, object_pairs_hook=without_duplicates)


def _name_shown(name: object) -> object:
    """Return a key as an error may show it: an unknown key may be a secret."""
    known = {*Settings.model_fields, *CacheConfig.model_fields, *ModelConfig.model_fields}
    known |= {*LayerGroup.model_fields, *old_names((Settings, CacheConfig)), *STORE_OPTIONS}
    return name if name in known else kind_of(name)


_FAULTS = (
    yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip
"""What parsers raise. YAML's passes on the errors of constructors: `!!bool x` is a KeyError."""


def _fault(error: BaseException) -> str:
    """Return what is wrong with a text, and where, without quoting the text."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        # The parser's own words end where the first quotation, or another error's text, begins.
        words = re.split("['\":]", error.problem or "", maxsplit=1)[0]
        words = re.sub(", but (found|got) *$|, *$", "", words).strip()
        return (words or "is not YAML") + place
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if (
        found := re.search(r":(\d+) Unexpected .* at column (\d+)$", str(error), re.DOTALL)
    ) is not None:
        words = (
            "ends too soon"
            if "Unexpected end of input" in str(error)[:60]
            else "unexpected character"
        )
        return f"{words} at line {found[1]}, column {found[2]}"
    return "a value does not match its tag or format"


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the keys that environment variables set, by their current names.

    Returns:
        The values, and for each key the variable that sets it.

    Raises:
        ConfigError: an unknown variable, or two that set one key or one size.
    """
    known = variable_keys()
    found: dict[str, Any] = {}
    variables: dict[str, str] = {}
    for variable, value in environ.items():
        if is_of_orchestrator(variable, value):
            continue
        if variable in known:
            found[known[variable]] = value
            variables[known[variable]] = variable
        elif variable.startswith("FLEXKV_") and variable != PATH_VARIABLE:
            guess = nearest(variable, known)
            raise ConfigError(
                variable, HIDDEN, f"unknown variable; the nearest known one is {guess}"
            )
    models = (Settings, CacheConfig)
    values, renames = current_names(found, models)
    announce(renames)
    variables = {renames.get(name, name): variable for name, variable in variables.items()}
    check_no_rivals(values, SIZE_PAIRS, variables)
    return values, variables


_SERVICE = re.compile(r"FLEXKV_(\w+?_)??SERVICE_(HOST|PORT)(_\w+)?")
_PORT = re.compile(r"FLEXKV_(\w+?_)??PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


def is_of_orchestrator(variable: str, value: str) -> bool:
    """Return whether an orchestrator has set a variable, for a service called flexkv or flexkv-x.

    Kubernetes puts the addresses of every service of a namespace into each container. One of
    these, `FLEXKV_X_PORT`, looks like a key of ours: then its value, an address, decides.
    """
    if _SERVICE.fullmatch(variable):
        return True
    port = _PORT.fullmatch(variable)
    if port is None:
        return False
    if variable in ("FLEXKV_SERVER_RECV_PORT",):
        return False  # an address that the user gives
    return port[1] is None or port[2] is not None or bool(_ADDRESS.match(value))


def document() -> str:
    """Return the text of `docs/configuration.md`, made from the keys' own definitions."""
    lines = [
        "# Configuration",
        "",
        "Made by `python -m flexkv.settings` from the definitions of the keys; do not edit.",
        "",
        "A key is given in code (`CacheConfig(...)`), in the file that `FLEXKV_CONFIG_PATH` names",
        "(JSON with comments, or YAML; flat, or with the cache's keys under `cache_config`), or as",
        "`FLEXKV_<KEY>` in the environment. The file wins over the environment. Older names are",
        "accepted with a warning. A file is read as UTF-8 in every locale, and no object in it may",
        "have the same key twice.",
        "",
        "Give a size that has two keys (`num_cpu_blocks` or `cpu_cache_gb`, and so on) by one of",
        "them: both in one source are refused. If the file has one and the environment the other,",
        "the file wins, and a log line says so.",
        "",
        "Kubernetes itself sets variables such as `FLEXKV_SERVICE_HOST` and `FLEXKV_PORT_80_TCP`",
        "if a service is called flexkv, or its name begins with `flexkv-`: these are ignored.",
    ]
    for title, model in (
        ("ModelConfig", ModelConfig),
        ("LayerGroup, an element of layer_groups", LayerGroup),
        ("CacheConfig", CacheConfig),
        ("Settings of a process", Settings),
    ):
        lines += ["", f"## {title}", "", "| key | default | meaning | older names |"]
        lines += ["|---|---|---|---|", *_rows(model)]
    return "\n".join([*lines, ""])


def _rows(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        facts = facts_of(field)
        default = facts.shown_default or field.get_default(call_default_factory=True)
        if field.default is PydanticUndefined and field.default_factory is None:
            default = "required"
        elif name == "cache_config":
            default = "as above"
        elif default in (None, "", ()):
            default = "none"
        meaning = field.description or ""
        if facts.unit:
            meaning += f" ({facts.unit})"
        meaning += _bounds(field)
        if facts.part:
            meaning += f" Not built yet: {facts.part.rstrip(',')}."
        if facts.retired:
            meaning += f" Retired: {facts.retired}."
        told = str(default).lower() if isinstance(default, bool) else str(default)
        old = ", ".join(f"`{name}`" for name in facts.old)
        yield f"| `{name}` | {told} | {meaning} | {old} |".replace(" |  |", " | |")


def _bounds(field: FieldInfo) -> str:
    """Return the bounds of a number, as a sentence with a space before it."""
    bounds = {
        name: getattr(rule, name)
        for rule in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(rule, name, None) is not None
    }
    told = []
    if (least := bounds.get("ge", bounds.get("gt"))) is not None:
        told.append(f"{'at least' if 'ge' in bounds else 'more than'} {least:g}")
    if (most := bounds.get("le", bounds.get("lt"))) is not None:
        told.append(f"{'at most' if 'le' in bounds else 'less than'} {most:.15g}")
    return f" {', '.join(told).capitalize()}." if told else ""


if __name__ == "__main__":
    import sys

    sys.stdout.write(document())
