#!/bin/sh
# The CPU rows of the kernels on this machine, when nothing else runs on it: some ten minutes of two idle cores.
# BEFORE=<worktree of 573f447> adds the tiny recipe's training step against the commit before the kernels; without it the
# script makes such a worktree for itself.
set -eu
cd "$(dirname "$0")/../.."
here=experiments/bench_kernels
python=${PYTHON:-.venv/bin/python}
PYTHONPATH=. "$python" scripts/bench.py blocks --json "$here/blocks.json" --plot "$here/ratios.png"
before=${BEFORE:-}
if [ -z "$before" ]; then
    before=$(mktemp -d)/before
    git worktree add --quiet --detach "$before" 573f447
    trap 'git worktree remove --force "$before"' EXIT
fi
PYTHONPATH=. "$python" scripts/bench.py recipe --before "$before" --json "$here/recipe.json"
"$python" "$here/join.py" "$here"
