"""Asyncio actors: the scheduler decides, one transfer actor per device or tier does."""
