"""Pure: which block of which tier holds which key, and who may touch it."""
