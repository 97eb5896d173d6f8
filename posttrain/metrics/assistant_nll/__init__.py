"""The `evaluate` module `assistant_nll`."""
