"""The mover's process: `python -m flexkv.mover SOCKET WINDOW PARENT`, started by `MoverLife`.

With `--check` it only tries to import Mooncake, and fails with the reason if that is impossible.
"""

from __future__ import annotations

import importlib
import socket
import sys

from flexkv.mover.serving import end_with_parent, serve
from flexkv.process.background import yield_to_all


def main(arguments: list[str]) -> None:
    """Serve the engine at the other end of a socket."""
    if arguments == ["--check"]:
        try:
            for module in ("mooncake.store", "mooncake.engine"):
                importlib.import_module(module)
        except ImportError as error:
            sys.exit(str(error))
        return
    connection, window, parent = map(int, arguments)
    end_with_parent(parent)
    yield_to_all()
    serve(socket.socket(fileno=connection), window)


if __name__ == "__main__":
    main(sys.argv[1:])
