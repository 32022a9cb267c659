"""Checks of options that several commands share."""

from __future__ import annotations

from math import isfinite

import typer

TIMES_MAX = 1e6


def finite(value: float) -> float:
    """Return `value` if it is finite, not negative, and at most `TIMES_MAX`.

    Raises:
        typer.BadParameter: it is not.
    """
    if not isfinite(value) or not 0 <= value <= TIMES_MAX:
        raise typer.BadParameter(f"{value} is not in the range 0<=x<={TIMES_MAX:g}.")
    return value
