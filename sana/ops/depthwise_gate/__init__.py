"""SiLU, 3x3 depthwise convolution and gate of Mix-FFN: naive.py is the truth, triton.py the speed, op.py the choice."""
