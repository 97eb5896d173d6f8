"""What `make quickstart` trains on: a tiny base model and its data, all made by this project, so nothing is downloaded."""
