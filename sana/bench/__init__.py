"""Measurements against other implementations: the same weights, the same inputs, one process.

Nothing else imports this package; peers such as diffusers are imported inside its functions, when they are asked for.
"""
