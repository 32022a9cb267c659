"""The parts of an engine's tiers: adapters, the ledger of the SSD tier, and its checks."""
