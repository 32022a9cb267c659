"""Reader of request traces in the Mooncake format: one JSON object a line.

    {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [id, …]}

Each hash id stands for 512 tokens; equal ids at equal positions stand for equal prefixes.
Source: the trace release of Mooncake (FAST '25).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from flexkv.common.decoding import decoded
from flexkv.common.errors import ConfigError, MalformedError
from flexkv.trace.lines import lines_of

TOKENS_PER_HASH_ID = 512


class TraceLine(msgspec.Struct, frozen=True):
    """One request of a trace."""

    timestamp: Annotated[float, Meta(ge=0, le=1e15)]
    """Milliseconds from the start of the trace."""
    input_length: int
    output_length: int
    hash_ids: list[Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]]


def read_trace(path: Path, limit: int | None = None) -> Iterator[TraceLine]:
    """Yield the requests of a trace in order, at most `limit` of them.

    Raises:
        ConfigError: the file is missing, or a line is not a request; the error names the line.
    """
    decoder = msgspec.json.Decoder(TraceLine)
    for number, line in enumerate(islice(lines_of(path, "trace"), limit), 1):
        try:
            yield decoded(decoder, line)
        except MalformedError as error:
            raise ConfigError("trace", f"{path} line {number}", error.why) from error
