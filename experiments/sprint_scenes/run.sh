#!/usr/bin/env bash
# Distils the shipped scenes model into a few-step student, trains the ablations, judges everything, and writes
# results.json, page.html, the pictures and the student's weights here. Stopped and called again, it goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1 PYTHONPATH=.
"$python" experiments/sprint_scenes/distil.py
"$python" experiments/sprint_scenes/measure.py
