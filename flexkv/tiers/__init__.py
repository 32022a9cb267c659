"""What the tiers of an engine are made of."""
