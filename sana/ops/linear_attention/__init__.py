"""ReLU linear attention: naive.py is the truth in plain torch, on any device and under any transform."""
