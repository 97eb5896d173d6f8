"""The `evaluate` module `preference`."""
