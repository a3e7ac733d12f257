"""Composing configurations, checking them, and the records a run leaves behind and how to read them."""
