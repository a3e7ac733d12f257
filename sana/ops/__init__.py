"""Tensors in, tensors out: <op>/naive.py is the truth in plain torch, <op>/triton.py (later) the speed. No modules, no parameters."""
