"""Public testing kit: virtual time, fakes that passed the contract, workloads with known bytes."""
