"""Prints the model file that a server needs, for engines that do not launch it themselves.

python -m flexkv.integration.vllm.model MODEL --dtype float16 > model.json   # as `vllm serve`
flexkv serve model.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from flexkv.common.config import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.integration.vllm.identity import weights_are_here
from flexkv.integration.vllm.setup import setup_of
from flexkv.server.launch import told_of


def model_of(arguments: Sequence[str]) -> ModelConfig:
    """Return the model of an engine that `vllm serve` would start with these arguments.

    Raises:
        ConfigError: FlexKV cannot serve such an engine, or its weights are not on this machine.
    """
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = list(arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    known, _ = parser.parse_known_args(words)  # the unknown ones are for the HTTP server
    engine = EngineArgs.from_cli_args(known)
    asked = engine.kv_transfer_config
    extra = {} if asked is None else asked.kv_connector_extra_config
    engine.kv_transfer_config = KVTransferConfig(
        kv_connector="FlexKVConnectorV1", kv_role="kv_both", kv_connector_extra_config=extra
    )
    config = engine.create_engine_config()
    if not weights_are_here(config):
        why = "its weights, which identify its blocks, are not on this machine: download them first"
        raise ConfigError("model", config.model_config.model, why)
    return setup_of(config).model


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # vLLM may log there
        told = told_of(model_of(sys.argv[1:]))
    sys.stdout.write(json.dumps(told, indent=2) + "\n")
