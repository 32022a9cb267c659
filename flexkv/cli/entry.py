"""The entry point of the `flexkv` command, which handles ctrl-C even during the imports."""

from __future__ import annotations

import sys
from typing import NoReturn


def app() -> NoReturn:
    """Import the commands, and run the one named on the command line."""
    try:
        from flexkv.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main.app()
