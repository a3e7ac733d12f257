#!/bin/sh
# Runs the demo and keeps its results and last sample grid here.
set -eu
cd "$(dirname "$0")/../.."
results=$(.venv/bin/python scripts/demo.py | tee /dev/stderr | tail -n 1)
cp "$results" experiments/demo/results.json
cp "$(ls "$(dirname "$results")"/samples/*.png | tail -n 1)" experiments/demo/drawn.png
