"""Sharing between nodes: who they are, what they have, and how they ask each other for it."""
