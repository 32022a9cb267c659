"""What a request of vLLM itself says about its loads, in `kv_transfer_params`.

{"kv_transfer_params": {"load_deadline_ms": 250}}
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from flexkv.common.config_keys import described
from flexkv.common.errors import ConfigError
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

DEADLINE = "load_deadline_ms"
DEADLINE_MS_MAX = 3_600_000


def load_deadline_s(params: Any) -> float | None:
    """Return how long a request may wait for far blocks; None if it does not say.

    Args:
        params: vLLM's `kv_transfer_params` of the request.

    Raises:
        ConfigError: the request says something that is not a time.
    """
    value = params.get(DEADLINE) if isinstance(params, Mapping) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < inf:
        why = "must be a number of milliseconds, 0 or more"
        raise ConfigError(f"kv_transfer_params.{DEADLINE}", described(value), why)
    return min(value, DEADLINE_MS_MAX) / 1e3


def accepted_deadline_s(request: Any) -> float | None:
    """Return how long one of vLLM's requests may wait for far blocks; None if it does not say.

    vLLM gives a connector no way to refuse a single request: an exception would end the engine. So
    a deadline that is no time is refused in the log, and the request waits for nothing.
    """
    try:
        return load_deadline_s(getattr(request, "kv_transfer_params", None))
    except ConfigError as error:
        log.warning("load_deadline_refused", request=request.request_id, field=error.field,
                    value=error.value, reason=error.why)  # fmt: skip
        return 0.0
