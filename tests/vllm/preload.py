"""Import what every engine needs once, in the process that others are forked from."""

from __future__ import annotations

import importlib
import importlib.util

if importlib.util.find_spec("vllm") is not None:
    for name in (
        "vllm.entrypoints.llm",
        "vllm.v1.engine.core",
        "vllm.v1.executor.multiproc_executor",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.llama",
        "vllm.distributed.kv_transfer.kv_connector.v1.flexkv_connector",
        "flexkv.integration.vllm.connector",
        "tests.vllm.engine",
    ):
        importlib.import_module(name)
