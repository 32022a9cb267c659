"""Pure: a request becomes a graph of transfer ops, a frozen plan, a running state machine."""
