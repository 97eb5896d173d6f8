"""The `evaluate` module `refusal`."""
