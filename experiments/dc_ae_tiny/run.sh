#!/bin/sh
# Trains the tiny autoencoder (about 12 minutes of two idle cores), measures it, and puts both here.
set -eu
cd "$(dirname "$0")/../.."
here=experiments/dc_ae_tiny
run=runs/dc_ae_tiny/shipped_$(date +%Y%m%d_%H%M%S)
python=${PYTHON:-.venv/bin/python}
"$python" train.py experiment=dc_ae/tiny run.dir="$run" seed=0
cp "$run/autoencoder.safetensors" "$here/dc_ae_tiny.safetensors"
PYTHONPATH=. "$python" "$here/measure.py" "$here/dc_ae_tiny.safetensors" --run "$run" \
    --out "$here/results.json" --sheet "$here/reconstructions.png"
