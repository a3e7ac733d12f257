"""What can be wrong with a file of weights."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, recognised or converted. One line: which file, what is wrong, what would be
    right."""
