"""How callers reach an engine: its loop in a thread, task ids, requests by layers."""
