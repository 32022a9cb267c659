"""From a request to a graph of transfer ops, a frozen plan and a state machine, without I/O."""
