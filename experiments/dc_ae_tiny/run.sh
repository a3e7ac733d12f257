#!/bin/sh
# Trains the tiny autoencoder (about 12 minutes of two idle cores), measures it, and puts both here.
set -eu
cd "$(dirname "$0")/../.."
here=experiments/dc_ae_tiny
run=runs/dc_ae_tiny/shipped_$(date +%Y%m%d_%H%M%S)
.venv/bin/python train.py experiment=dc_ae/tiny run.dir="$run" seed=0
cp "$run/autoencoder.safetensors" "$here/dc_ae_tiny.safetensors"
PYTHONPATH=. .venv/bin/python "$here/measure.py" "$here/dc_ae_tiny.safetensors" --out "$here/measured.json" --sheet "$here/reconstructions.png"
