"""What vLLM carries from the scheduler's connector to the workers' connectors in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What workers do and report in one step.

    Attributes:
        puts: numbers of puts that read what this step's forward writes.
        loads: numbers of gets that may write once the steps before this one are done.
        received: vLLM's ids of requests whose loads are over.
        sent: vLLM's ids of requests that have ended, and whose blocks no put reads any more.
        layer_loads: numbers of gets by layer that this step's forward waits for, and the device
            blocks of each.
        failed_blocks: device blocks that should have been loaded and were not.
        dropped: numbers of puts of requests some of whose blocks could not be loaded.
        settle: numbers of failed puts and gets: the worker waits until none of their copies is
            left before it reports anything.
    """

    puts: list[int] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)
    layer_loads: dict[int, list[int]] = field(default_factory=dict)
    received: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)
    settle: list[int] = field(default_factory=list)
