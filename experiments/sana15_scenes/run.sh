#!/usr/bin/env bash
# Grows, prunes and chooses among scenes networks over three seeds, two runs of one thread at a time, and writes
# results.json, page.html and the plots here. Stopped and called again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1 PYTHONPATH=.
"$python" train.py experiment=sana15/scenes network.depth=1 trainer.max_steps=1 model.compile=false callback.evaluation=null \
    callback.checkpoints=null callback.importance=null run.dir=runs/sana15_scenes/data_"$(date +%Y%m%d_%H%M%S)"  # the shards, before two need them
"$python" experiments/sana15_scenes/chain.py
"$python" experiments/sana15_scenes/measure.py
