#!/usr/bin/env bash
# Makes config.json, model.safetensors, tokenizer.json, tokenizer_config.json and results.json anew.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec env PYTHONPATH=. "${PYTHON:-.venv/bin/python}" scripts/make_gemma_tiny.py --out experiments/gemma_tiny "$@"
