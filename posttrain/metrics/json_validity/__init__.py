"""The `evaluate` module `json_validity`."""
