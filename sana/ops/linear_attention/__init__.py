"""ReLU linear attention: op.py is what networks call. naive.py is the truth in plain torch, on any device and under any
transform; triton.py launches kernels.py, cut as plan.py says."""
