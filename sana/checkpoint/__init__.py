"""Formats of weights and conversion between them. Functions on state dicts and files; no networks are built."""
