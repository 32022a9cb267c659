"""What every engine integration needs."""
