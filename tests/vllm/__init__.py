"""Tests with a real vLLM engine: `make test-vllm`."""
