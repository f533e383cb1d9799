#!/bin/sh
# Everything that needs a GPU, in less than 9 minutes and without a network: correctness first, timing second.
# Usage: bench/gpu_suite.sh OUTDIR [--dry-run]. Writes OUTDIR/gpu_suite.json and OUTDIR/gpu_suite.md.
# The package must be installed where PYTHON (default: .venv/bin/python, else python3) looks. --dry-run needs no GPU.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v "$python" || command -v python3)
export HF_HUB_OFFLINE=1
exec "$python" -m bench.gpu_suite "$@"
