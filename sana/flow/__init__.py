"""Paths, timestep distributions and shifts, time grids. Pure functions of tensors; no networks, no loops over steps."""
