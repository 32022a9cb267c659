"""How callers reach an engine: its door, its loop in a thread, task ids, requests by layer."""
