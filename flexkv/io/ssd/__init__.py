"""The SSD tier: its files, its journals, and the adapters that read and write them."""
