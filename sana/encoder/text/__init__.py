"""Text encoders from prompts to token features and masks."""
