"""Where the `flexkv` command begins: ctrl-C during its imports is not an error, either."""

from __future__ import annotations

import sys
from typing import NoReturn


def app() -> NoReturn:
    """Import the commands, and run the one that the command line names."""
    try:
        from flexkv.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main.app()
