#!/usr/bin/env bash
# Errors and times (measure.py), ways to lessen the errors (ways.py), then the score of the scenes model in every format.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 PYTHONPATH=.
python="${PYTHON:-.venv/bin/python}" out="${OUT:-runs/quant_formats}"
"$python" experiments/quant_formats/measure.py
"$python" experiments/quant_formats/ways.py
for quant in none int8_weight int8 fp8 nvfp4 w4a16; do
  "$python" eval.py ckpt=scenes metric=geneval_scenes per_task=15 held_out=5 seed=77 "quant=$quant" \
    "out=$out/$quant" "output=$out/$quant.json"
done
