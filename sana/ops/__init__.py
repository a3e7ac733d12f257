"""Tensors in, tensors out: <op>/naive.py is the truth in plain torch. No modules, no parameters."""
