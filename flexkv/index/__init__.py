"""The index of places: which blocks they hold, and who may touch them. No I/O."""
