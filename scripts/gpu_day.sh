#!/usr/bin/env bash
# What a bare GPU machine is for, in stages of at most eight minutes each. It has its own torch, Lightning and
# transformers and may reach no registry, so what it lacks comes along as wheels.
#
#   scripts/gpu_day.sh wheels         where a registry can be reached: fills .wheels for Python 3.12 on x86-64
#   scripts/gpu_day.sh day [SECONDS]  all rows in the order of worth, within so many seconds (280): first what checks the
#                                     kernels, then networks, attention, decoder, drawings, training, compiled peers
#   scripts/gpu_day.sh tests          the tests of the kernels, and those that need a GPU
#   scripts/gpu_day.sh operators | models | autoencoder | end | update   the rows of one stage
#   scripts/gpu_day.sh sample         drawing against diffusers with the same weights, stage by stage
#   scripts/gpu_day.sh ideas          many recipes of the scenes at once (experiments/scenes/ideas.py)
#
# Files go to $OUT, or to experiments/performance: rows.json is written after every row, and the same command goes on
# after the rows that it holds. SANA_COMMIT names the commit where there is no .git; BENCH adds options of bench.py, such as
# "--size tiny --device cpu --dtype fp32" to try a stage without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
stage=${1:?"give a stage: wheels, day, tests, operators, models, autoencoder, end, update, sample or ideas"}
out=${OUT:-experiments/performance}
site=${TMPDIR:-/tmp}/sana_site
python=${PYTHON:-python3}

wheels() {
    mkdir -p .wheels
    here=${PYTHON:-.venv/bin/python}
    "$here" -m pip wheel --quiet --no-deps --wheel-dir .wheels antlr4-python3-runtime==4.9.3 # a source distribution
    "$here" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest .wheels \
        hydra-core==1.3.8 omegaconf==2.3.1 simplejpeg==1.9.0 beartype diffusers==0.42.0
    du -sh .wheels
    ls .wheels
}

ready() {
    mkdir -p "$out" "$site"
    if compgen -G ".wheels/*.whl" >/dev/null; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .wheels/*.whl
    fi
    export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=${TMPDIR:-/tmp}/sana_inductor
    export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/card.txt"
    fi
    first=() tests=() others=() # what is timed has cores of its own, if the machine has enough of them
    if [ "$(nproc)" -ge 12 ]; then first=(taskset -c 0-3) tests=(taskset -c 4-7) others=(taskset -c 8-15); fi
}

# rows STAGE SECONDS [OPTION...]: once more whenever a kernel has broken the device for the process.
rows() {
    local what=$1 seconds=$2 start=$SECONDS code=3 left
    shift 2
    while [ "$code" -eq 3 ]; do
        left=$((seconds - (SECONDS - start)))
        # shellcheck disable=SC2086
        "${first[@]}" timeout -k 5 $((left + 45)) "$python" scripts/bench.py "$what" --seconds "$left" \
            --json "$out/rows.json" --plot "$out/ratios.png" "$@" ${BENCH:-} 2> >(tee -a "$out/log.txt" >&2) | tee "$out/table.txt"
        code=$?
    done
    return "$code"
}

# kernel_tests SECONDS PROCESSES: a line per test as it ends (-v), so that what failed is known where time runs out; the
# processes get ten seconds to stop, and only then pytest says why.
kernel_tests() {
    "${tests[@]}" timeout -s INT -k 20 "$1" "$python" -m pytest -v -p no:cacheprovider -n "$2" -m "not long and not slow" \
        tests/ops --ignore tests/ops/test_random.py --ignore tests/ops/test_resize.py >"$out/kernel_tests.txt" 2>&1
}

# failures FILE...: each test that failed, once, with its reason where pytest came to say it.
failures() {
    grep -hoE "(FAILED|ERROR) tests/.*" "$@" | cut -c 1-200 | sort -r | awk '!seen[$2]++'
}

case $stage in
wheels) wheels ;;
day)
    seconds=${2:-280}
    ready
    kernel_tests 60 4 &
    checks=$!
    "${others[@]}" timeout "$seconds" "$python" scripts/bench.py warm ${BENCH:-} >"$out/warm.txt" 2>&1 &
    warm=$!
    rows day $((seconds - SECONDS)) --wait "$checks"
    wait "$checks"
    kill "$warm" 2>/dev/null
    echo "kernel tests: $(tail -n 1 "$out/kernel_tests.txt")"
    failures "$out/kernel_tests.txt" | head -40
    ;;
tests)
    ready
    kernel_tests 330 8
    tail -n 1 "$out/kernel_tests.txt"
    failures "$out/kernel_tests.txt"
    timeout -s INT -k 20 100 "$python" -m pytest -v -p no:cacheprovider -m gpu tests >"$out/tests.txt" 2>&1
    tail -n 1 "$out/tests.txt"
    failures "$out/tests.txt"
    ;;
operators | models | autoencoder | end | update)
    ready
    rows "$stage" 450
    ;;
sample)
    ready
    for row in "600m 512" "600m 1024" "1600m 512" "1600m 1024" "1600m 2048"; do
        read -r size px <<<"$row"
        "$python" scripts/bench.py sample --size "$size" --px "$px" --steps 20 --tokens 40 --repeats 3 --dtype bf16 \
            --json "$out/sample_${size}_$px.json" || echo "$row: failed" >&2
    done
    ;;
ideas)
    ready
    "$python" experiments/scenes/ideas.py --json "$out/ideas.json"
    ;;
*)
    echo "gpu_day.sh: no stage $stage; expected wheels, day, tests, operators, models, autoencoder, end, update, sample or ideas" >&2
    exit 2
    ;;
esac
