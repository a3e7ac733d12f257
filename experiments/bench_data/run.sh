#!/bin/sh
# Loading speed of ours, webdataset, litdata and mosaicml-streaming: about 20 minutes of two cores that do nothing else.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
PYTHONPATH=. "$python" scripts/bench_data.py --json experiments/bench_data/results.json "$@"
