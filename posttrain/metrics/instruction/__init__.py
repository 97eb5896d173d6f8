"""The `evaluate` module `instruction`."""
