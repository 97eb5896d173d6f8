"""Curation: from many rows to a few good ones, with an account of every row.

`step` says what a step is, `rows` reads and rewrites the text of a row; each other module holds the steps of one idea.
"""
