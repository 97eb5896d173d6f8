"""The `evaluate` module `regex_match`."""
