#!/usr/bin/env bash
# Makes the scenes base model anew: trains two seeds, judges both and their checkpoints, and puts weights, figures and
# pictures here. Stopped and called again, it goes on where it was. SEEDS="1" trains one.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
here=experiments/scenes
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    devices=(strategy=single)
else
    devices=(strategy=ddp trainer.devices=2)
    export OMP_NUM_THREADS=1
fi
finished() { [ -f "$1/status.json" ] && grep -q '"status": "finished"' "$1/status.json"; }
for seed in ${SEEDS:-1 2}; do
    home=runs/scenes/seed$seed
    mkdir -p "$home"
    last=$(find "$home" -maxdepth 1 -name 'part*' | sort | tail -n 1)
    if [ -z "$last" ] || ! finished "$last"; then
        part=$home/part$(date +%Y%m%d_%H%M%S)
        from=$(find "$home" -name 'step_*.ckpt' | sort -t_ -k3 | awk -F/ '{print $NF, $0}' | sort | tail -n 1 | cut -d' ' -f2)
        "$python" train.py experiment=image/scenes seed="$seed" run.dir="$part" "${devices[@]}" ${from:+resume="$from"}
    fi
done
PYTHONPATH=. "$python" $here/measure.py
