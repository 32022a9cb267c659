"""Where the remote tier is: its URL, and the options of the store's client.

remote_cache_path       s3://bucket/prefix  gs://bucket/prefix  az://container/prefix
                        file:///directory   memory://
remote_config_custom    {"endpoint": …, "region": …, …}: options as obstore calls them
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from flexkv.common.errors import HIDDEN, ConfigError
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

PATH_KEY, OPTIONS_KEY = "remote_cache_path", "remote_config_custom"
KINDS = {
    "s3": "s3", "s3a": "s3", "gs": "gs", "az": "az", "azure": "az", "abfs": "az", "abfss": "az",
    "memory": "memory", "file": "directory",
}  # fmt: skip
"""The kind of store of each scheme."""
_BUCKETS = {"s3": "bucket", "gs": "bucket", "az": "container_name"}
_OTHER_NAMES = {
    "access_key": "access_key_id", "secret_key": "secret_access_key", "endpoint_url": "endpoint",
}  # fmt: skip
_CLIENT_OPTIONS = {
    "allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type",
    "default_headers", "http1_only", "http2_keep_alive_interval", "http2_keep_alive_timeout",
    "http2_keep_alive_while_idle", "http2_only", "pool_idle_timeout", "pool_max_idle_per_host",
    "proxy_url", "proxy_ca_certificate", "proxy_excludes", "root_certificate",
    "randomize_addresses", "read_timeout", "timeout", "user_agent",
}  # fmt: skip
"""What obstore takes as options of its HTTP client, and not of the store."""
_AWS_ENDPOINT = "s3.amazonaws.com"
"""AWS's endpoint of all regions redirects to those of the regions, which obstore knows."""
SENT = {"access_key_id", "secret_access_key", "session_token", "token", "region", "bucket"}
"""Options that are sent as parts of a URL or a header. obstore panics if they cannot be."""
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]*")
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9a-f:.]+")


class _Hidden:
    """A value that errors do not show."""

    def __repr__(self) -> str:
        return HIDDEN


UNSHOWN = _Hidden()


class RemoteAddress(NamedTuple):
    """A store to open.

    Attributes:
        kind: "s3", "gs", "az", "memory" or "directory".
        url: the URL without anything secret.
        config: the store's options.
        client_options: those of its HTTP client.
    """

    kind: str
    url: str
    config: dict[str, Any]
    client_options: dict[str, Any]

    def __repr__(self) -> str:
        return f"RemoteAddress({self.url})"


def parse_address(url: str, custom: Mapping[str, Any]) -> RemoteAddress:
    """Return what `remote_cache_path` and `remote_config_custom` describe.

    Raises:
        ConfigError: the URL is malformed, or an option contradicts it.
    """
    parts = urlsplit(url)
    kind = KINDS.get(parts.scheme)
    if kind is None:
        why = f"must begin with one of {', '.join(f'{scheme}://' for scheme in KINDS)}"
        raise ConfigError(PATH_KEY, _shown(url), why)
    if parts.username or parts.password or parts.query or parts.fragment:
        why = f"must be a bucket and a prefix only; credentials belong in {OPTIONS_KEY}"
        raise ConfigError(PATH_KEY, _shown(url), why)
    options = {_OTHER_NAMES.get(name, name): value for name, value in custom.items()}
    for name, value in options.items():
        if name.removeprefix("aws_") in SENT:
            check_sent(f"{OPTIONS_KEY}.{name}", value)
    client_options = {name: options.pop(name) for name in _CLIENT_OPTIONS & options.keys()}
    if kind == "directory":
        return _directory(url, parts.netloc, parts.path, options)
    if kind == "memory":
        return RemoteAddress(kind, "memory://", {}, {})
    return _cloud(kind, url, options, client_options)


def check_sent(field: str, value: object) -> None:
    """Check a value that is sent in a URL or a header.

    Raises:
        ConfigError: it cannot be; the value is not shown.
    """
    if not isinstance(value, str):
        raise ConfigError(field, UNSHOWN, "must be a text")
    if not value.isascii() or not value.isprintable() or " " in value:
        why = "has a space, a line break, or another character that cannot be sent"
        raise ConfigError(field, UNSHOWN, why)


def _directory(url: str, host: str, path: str, options: dict[str, Any]) -> RemoteAddress:
    if host not in ("", "localhost") or not path.strip("/"):
        raise ConfigError(PATH_KEY, url, "must be an absolute directory, as in file:///mnt/kv")
    if options:
        raise ConfigError(f"{OPTIONS_KEY}.{min(options)}", UNSHOWN, "a directory has no options")
    return RemoteAddress("directory", path, {}, {})


def _cloud(
    kind: str, url: str, options: dict[str, Any], client_options: dict[str, Any]
) -> RemoteAddress:
    bucket, key = urlsplit(url).netloc, _BUCKETS[kind]
    given = options.pop("bucket", options.pop(key, "")) or ""
    if bucket and given and bucket != given:
        why = f"contradicts {PATH_KEY}, whose bucket is {bucket!r}"
        raise ConfigError(f"{OPTIONS_KEY}.bucket", given, why)
    bucket = bucket or given
    if not bucket:
        raise ConfigError(PATH_KEY, url, "names no bucket")
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(PATH_KEY, url, f"no bucket can have the name {bucket!r}")
    endpoint = options.pop("endpoint", None) or ""
    if not isinstance(endpoint, str):
        raise ConfigError(f"{OPTIONS_KEY}.endpoint", endpoint, "must be a host, or a http URL")
    endpoint = endpoint.rstrip("/")
    if endpoint.removeprefix("https://") == _AWS_ENDPOINT:
        endpoint = ""
    if endpoint:
        secure = _check_endpoint(endpoint, bucket)
        endpoint = endpoint if "://" in endpoint else f"https://{endpoint}"
        options["base_url" if kind == "gs" else "endpoint"] = endpoint
        if not secure:
            client_options.setdefault("allow_http", True)
    prefix = urlsplit(url).path.strip("/")
    if prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/")):
        why = "its prefix has a part that is empty, '.' or '..'"
        raise ConfigError(PATH_KEY, url, why)
    scheme = urlsplit(url).scheme
    shown = f"{scheme}://{bucket}/{prefix}".rstrip("/")
    return RemoteAddress(kind, shown, options, client_options)


def _check_endpoint(endpoint: str, bucket: str) -> bool:
    """Return whether what is sent to an endpoint is encrypted; warn if others could read it.

    Raises:
        ConfigError: it is not the URL of a host, or has the bucket in its path.
    """
    field = f"{OPTIONS_KEY}.endpoint"
    parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    if parts.username or parts.password or parts.query or parts.fragment:
        why = "must be a host and a port; credentials have options of their own"
        raise ConfigError(field, UNSHOWN, why)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host):
        raise ConfigError(field, endpoint, "must be a host, or a http URL")
    if not _has_port(parts):
        raise ConfigError(field, endpoint, "its port must be a number from 1 to 65535")
    if parts.path.rpartition("/")[2] == bucket:
        why = f"must not end in the bucket, which {PATH_KEY} names"
        raise ConfigError(field, endpoint, why)
    if parts.scheme == "http" and not _is_loopback(host):
        why = "anyone on the way can read and change the blocks"
        log.warning("remote_not_encrypted", endpoint=endpoint, reason=why)
    return parts.scheme == "https"


def _has_port(parts: SplitResult) -> bool:
    """Return whether the port of a URL, if it names one, can be a port."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(url: str) -> str | _Hidden:
    """Return a URL for an error, unless it may contain credentials."""
    return UNSHOWN if "@" in url or "?" in url else url
