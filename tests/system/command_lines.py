"""Run command lines of `flexkv`, each in a process forked from this one, which has imported it.

`python command_lines.py FOLDER < lines`: each line of stdin says in JSON what to run, and each line
of stdout says in JSON how it ended. Importing, which takes seconds, happens only once.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from flexkv.cli.main import app

HANG_S = 30
MEMORY_BYTES = 6 << 30
"""The limit of address space for each command line."""


def run(told: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    """Run a command line in a forked process, and return its exit status and stderr."""
    paths = [folder / f"{number}.{stream}" for stream in ("stdin", "stdout", "stderr")]
    paths[0].write_bytes(told.get("stdin", "").encode("latin-1"))
    streams = [told.get(stream) for stream in ("in", "out", "err")]
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        signal.alarm(HANG_S)
        os.chdir(folder)
        os.environ.update(told.get("environment", {}))
        for fd, (path, asked) in enumerate(zip(paths, streams, strict=True)):
            flags = os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT
            os.close(fd)
            if asked != "closed":
                opened = os.open(asked or path, flags, 0o600)
                if opened != fd:
                    os.dup2(opened, fd)
                    os.close(opened)
        names = ("stdin", "stdout", "stderr")
        for fd, (name, asked) in enumerate(zip(names, streams, strict=True)):
            # As at the interpreter's start: a closed stream is None.
            mode = "r" if fd == 0 else "w"
            stream = None if asked == "closed" else os.fdopen(fd, mode, closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        sys.argv = ["flexkv", *told["arguments"]]
        code: Any = 1
        try:
            app()
        except SystemExit as ended:
            code = ended.code
        except BaseException:  # noqa: BLE001 -- handled as the interpreter would
            os.write(2, traceback.format_exc().encode(errors="replace"))
        os._exit(code if isinstance(code, int) else 1)
    _, status = os.waitpid(child, 0)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "stderr": paths[2].read_text(errors="replace") if paths[2].exists() else "",
    }


def main() -> None:
    """Run the command line of each line of stdin."""
    folder = Path(sys.argv[1])
    for number, line in enumerate(sys.stdin.read().splitlines()):
        sys.stdout.write(json.dumps(run(json.loads(line), number, folder)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
