#!/bin/sh
# Drawing against diffusers on this machine, when nothing else runs on it: about 15 minutes of two idle cores.
set -eu
cd "$(dirname "$0")/../.."
here=experiments/bench_sample
python=${PYTHON:-.venv/bin/python}
for dtype in fp32 bf16; do
    PYTHONPATH=. "$python" scripts/bench.py sample --size 600m --px 512 --steps 20 --repeats 2 --dtype "$dtype" \
        --peer diffusers --json "$here/$dtype.json"
done
"$python" "$here/join.py" "$here/fp32.json" "$here/bf16.json" "$here/results.json"
rm "$here/fp32.json" "$here/bf16.json"
