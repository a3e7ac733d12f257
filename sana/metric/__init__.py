"""Scores of generated images. Receives images and prompts; never a model."""
