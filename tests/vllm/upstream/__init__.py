"""Scenarios of vLLM's connector tests, written anew over its utilities: see `test_upstream.py`."""
