"""Integrators of a velocity and guidance of it. Functions of callables; no networks, no decoding."""
