"""The denoisers: velocity fields forward(x, t, cond) -> v. No losses, no samplers, no encoders."""
