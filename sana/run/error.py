"""What a user can do wrong before a run starts."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, file or directory that a run cannot start with. The message is one line per problem: which
    key or file, what is wrong, what would be right."""


class RunError(RuntimeError):
    """A run that had begun cannot go on, for a reason that one line says."""
