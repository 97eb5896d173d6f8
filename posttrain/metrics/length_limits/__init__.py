"""The `evaluate` module `length_limits`."""
