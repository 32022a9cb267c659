"""The connector to vLLM."""
