"""Public testing kit: virtual time, fakes that pass the contract tests, known bytes."""
