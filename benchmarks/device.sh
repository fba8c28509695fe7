#!/bin/sh
# Everything that wants a GPU, in under nine minutes on one: tests, kernels, a language model, integer pretraining.
#
#   OUT=results sh benchmarks/device.sh      QUICK=1: does it run? (a minute; no figures)
#
# PYTHON names the interpreter (default .venv/bin/python). Results: $OUT/*.json, one table $OUT/<gpu>.md, output in $OUT/device.log.
# A step that fails does not stop the others; the exit status is then 1. Each step has a limit of its own.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}; PYTHON=${PYTHON:-.venv/bin/python}; QUICK=${QUICK:+--quick}
mkdir -p "$OUT"; LOG="$OUT/device.log"; : > "$LOG"; failed=""

step() {  # name, seconds, command ...
    name=$1; limit=$2; shift 2; began=$(date +%s)
    if timeout "$limit" "$@" >> "$LOG" 2>&1; then word=ok; else word="FAILED ($?)"; failed="$failed $name"; fi
    echo "$name: $word, $(( $(date +%s) - began )) s" | tee -a "$LOG"
}

"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "device.sh: PyTorch sees no CUDA device here")' || exit 2
nvidia-smi -L | tee -a "$LOG"
step "integer engine, tests" 90 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_pretrain/test_cuda.py
step "noise and layers, tests" 120 "$PYTHON" -m pytest -q -p no:cacheprovider -x tests/test_torch/test_threefry.py tests/test_torch/test_linear_triton.py -k "not interpret"
step "one layer, bfloat16" 120 "$PYTHON" benchmarks/bench_kernels_cuda.py --dtypes bfloat16 --turns 7 --graphs --results "$OUT" $QUICK
step "language model, bfloat16" 120 "$PYTHON" benchmarks/bench_population_forward.py --device cuda --dtypes bfloat16 --turns 5 --ranks 1 8 --results "$OUT" $QUICK
step "a whole generation, bfloat16" 60 "$PYTHON" benchmarks/bench_generation.py --device cuda --dtypes bfloat16 --turns 5 --results "$OUT" $QUICK
step "integer pretraining" 90 "$PYTHON" benchmarks/bench_pretrain.py --device cuda --turns 5 --results "$OUT" $QUICK
[ -n "$QUICK" ] || step "table" 30 "$PYTHON" benchmarks/summary.py --results "$OUT" --out "$OUT/benchmarks.md"
[ -z "$failed" ] || { echo "failed:$failed; $LOG says why"; exit 1; }
