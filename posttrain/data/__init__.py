"""Training and evaluation data: from files and Hub data sets to rows of one shape. No torch.

`source` opens what a config names, `files` reads raw records, `formats` makes them rows, `rows` says what a row is.
"""
