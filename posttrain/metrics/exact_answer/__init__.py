"""The `evaluate` module `exact_answer`."""
