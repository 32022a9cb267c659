"""One engine: its composition, its life, and its requests."""
