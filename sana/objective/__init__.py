"""Losses as pure functions of callables and tensors; per-sample losses out. No random numbers, no modules owned."""
