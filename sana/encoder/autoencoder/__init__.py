"""Autoencoders between pixels in [-1, 1] and latents scaled to unit order."""
