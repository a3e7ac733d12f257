#!/usr/bin/env bash
# What a bare GPU machine is for, in stages of at most eight minutes each. It has its own torch, Lightning and
# transformers and may reach no registry, so what it lacks comes along as wheels.
#
#   scripts/gpu_day.sh wheels         where a registry can be reached: fills .wheels for Python 3.12 on x86-64
#   scripts/gpu_day.sh tests [OUT]    the tests that need a GPU
#   scripts/gpu_day.sh sample [OUT]   drawing against diffusers with the same weights: a JSON per row, written after it
#   scripts/gpu_day.sh ideas [OUT]    many recipes of the scenes at once (experiments/scenes/ideas.py)
#
# OUT is experiments/performance if it is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:?"give a stage: wheels, tests, sample or ideas"}
out=${2:-experiments/performance}
site=${TMPDIR:-/tmp}/sana_site

wheels() {
    mkdir -p .wheels
    python=${PYTHON:-.venv/bin/python}
    "$python" -m pip wheel --quiet --no-deps --wheel-dir .wheels antlr4-python3-runtime==4.9.3 # a source distribution
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest .wheels \
        hydra-core==1.3.8 omegaconf==2.3.1 simplejpeg==1.9.0 beartype diffusers
    ls .wheels
}

ready() {
    mkdir -p "$out" "$site"
    python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" .wheels/*.whl
    export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/card.txt"
}

case $stage in
wheels) wheels ;;
tests)
    ready
    python3 -m pytest -q -p no:cacheprovider -m gpu tests | tee "$out/tests.txt"
    ;;
sample)
    ready
    for row in "600m 512" "600m 1024" "1600m 512" "1600m 1024" "1600m 2048"; do
        read -r size px <<<"$row"
        python3 scripts/bench.py sample --size "$size" --px "$px" --steps 20 --tokens 40 --repeats 3 --dtype bf16 \
            --json "$out/sample_${size}_$px.json" || echo "$row: failed" >&2
    done
    ;;
ideas)
    ready
    python3 experiments/scenes/ideas.py --json "$out/ideas.json"
    ;;
*)
    echo "gpu_day.sh: no stage $stage; expected wheels, tests, sample or ideas" >&2
    exit 2
    ;;
esac
