"""The mutation run: `python -m tests.mutation`, or `make mutants`."""
