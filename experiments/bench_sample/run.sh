#!/bin/sh
# Drawing against diffusers on this machine, when nothing else runs on it: in fp32 some ten minutes of two idle cores;
# in bf16 as well where the processor multiplies in it (`REPEATS=2` for two pairs per length: twice that).
set -eu
cd "$(dirname "$0")/../.."
here=experiments/bench_sample
python=${PYTHON:-.venv/bin/python}
dtypes=fp32
if grep -q -E 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtypes="fp32 bf16"; fi
for dtype in $dtypes; do
    PYTHONPATH=. "$python" scripts/bench.py sample --size 600m --px 512 --steps 20 --repeats "${REPEATS:-1}" \
        --dtype "$dtype" --peer diffusers --json "$here/$dtype.json"
done
"$python" "$here/join.py" "$here"
