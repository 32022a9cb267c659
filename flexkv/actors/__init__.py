"""Asyncio actors: the scheduler decides what is moved; one actor per device or tier moves it."""
