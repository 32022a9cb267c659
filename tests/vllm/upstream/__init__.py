"""Scenarios of vLLM's connector tests, told anew over its utilities: see `test_upstream.py`."""
