"""A FlexKV server started from code, as `flexkv serve model.json` does it.

    python examples/run_server.py                # files in ./flexkv-server; or name a directory

When it logs `server_listens`, run `python examples/scheduler_server_example.py` in another
terminal. Ctrl-C ends the server.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from flexkv.cli.serve import run
from flexkv.common.config import CacheConfig, ModelConfig, Settings
from flexkv.observe.logs import configure_logging

MODEL = ModelConfig(
    num_layers=8, num_kv_heads=4, head_size=64, dtype="float16", tp_size=2, model_id="example"
)


def folder_of(arguments: list[str]) -> Path:
    """Return the folder that a command line names, or the default."""
    return Path(arguments[1] if len(arguments) > 1 else "flexkv-server")


def settings_in(folder: Path) -> Settings:
    """Return the settings that server, scheduler and workers share; files and socket in `folder`.

    The address is set only to keep the example apart from other servers. The default address is in
    a directory of this user.
    """
    cache = CacheConfig(
        tokens_per_block=16, num_cpu_blocks=1024, num_ssd_blocks=4096, ssd_cache_dir=str(folder)
    )
    return Settings(server_recv_port=f"ipc://{folder.absolute()}/socket", cache_config=cache)


if __name__ == "__main__":
    where = folder_of(sys.argv)
    where.mkdir(0o700, exist_ok=True)  # nobody else may write to it
    configure_logging()
    asyncio.run(run(MODEL, settings_in(where)))
