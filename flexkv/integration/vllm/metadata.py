"""What vLLM carries from the scheduler's connector to those of the workers, each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What workers do and report in one step.

    Attributes:
        puts: numbers of requests that read what this step's forward writes.
        loads: numbers of requests that may write once the steps before this one are done.
        received: vLLM's requests whose loads are over.
        sent: vLLM's requests that have ended, and whose blocks nobody reads any more.
        failed_blocks: device blocks that were to be loaded and are not.
        dropped: numbers of puts whose blocks another connector has failed to load.
        settle: numbers of requests that failed: no copy of theirs may be left before that is told.
    """

    puts: list[int] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)
    received: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)
    settle: list[int] = field(default_factory=list)
