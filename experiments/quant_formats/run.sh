#!/usr/bin/env bash
# Errors and times (measure.py), ways to lessen the errors (ways.py), then the score of the scenes model in every format.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 PYTHONPATH=.
python="${PYTHON:-.venv/bin/python}" out="${OUT:-runs/quant_formats}"
"$python" experiments/quant_formats/measure.py
"$python" experiments/quant_formats/ways.py
score() {  # name, settings
  "$python" eval.py ckpt=scenes metric=geneval_scenes per_task=15 held_out=5 seed=77 "${@:2}" \
    "out=$out/$1" "output=$out/$1.json"
}
for quant in none int8_weight int8 fp8 nvfp4 w4a16; do
  score "$quant" "quant=$quant"
done
score int8_rotated quant=int8 quant.rotate=16
score nvfp4_searched quant=nvfp4 quant.search=true
