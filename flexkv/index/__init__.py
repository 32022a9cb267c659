"""Which places of which tier hold which blocks, and who may touch them; without I/O."""
