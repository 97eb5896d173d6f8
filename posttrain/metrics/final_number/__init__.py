"""The `evaluate` module `final_number`."""
