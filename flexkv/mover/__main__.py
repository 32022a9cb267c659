"""The mover's process: `python -m flexkv.mover SOCKET WINDOW PARENT`, started by `MoverLife`.

With `--check` it says instead why it could not be used, or nothing.
"""

from __future__ import annotations

import importlib
import socket
import sys

from flexkv.mover.serving import end_with_parent, serve


def main(arguments: list[str]) -> None:
    """Serve the engine at the other end of a socket."""
    if arguments == ["--check"]:
        try:
            importlib.import_module("mooncake.store")
        except ImportError as error:
            sys.exit(str(error))
        return
    connection, window, parent = map(int, arguments)
    end_with_parent(parent)
    serve(socket.socket(fileno=connection), window)


if __name__ == "__main__":
    main(sys.argv[1:])
