"""RMSNorm with gain, bias, activation and residual: naive.py is the truth, triton.py the speed, op.py the choice."""
