"""Optimizers and learning-rate schedules that torch lacks."""
