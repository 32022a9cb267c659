"""One engine: its composition, its life cycle, and its requests."""
