"""Layer norm and residual sums modulated per frame: naive.py is the truth, triton.py the speed, op.py the choice."""
