"""Frozen or trainable encoders: autoencoder/ (images to latents) and text/ (prompts to features)."""
