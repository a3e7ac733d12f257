#!/usr/bin/env bash
# What low precision costs the scenes model: the same pairs of prompt and seed in every arm, judged by the oracle.
# Stopped and called again, it goes on. ARMS="int8 fp8" takes some arms, PER_TASK=4 fewer pairs (6 times as many).
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH=.
"${PYTHON:-.venv/bin/python}" experiments/quant_scenes/measure.py
