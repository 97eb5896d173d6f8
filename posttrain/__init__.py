"""Shared code of the pipeline: every module is named after the one noun it is about.

Importing this package, or any module that planning needs, imports no torch.
"""

__version__ = "0.1.0"
