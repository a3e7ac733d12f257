"""LayerNorm and residual sums modulated per frame (adaLN): naive.py is the truth, triton.py the speed, op.py the choice."""
