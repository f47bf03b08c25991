#!/bin/sh
# Unpack the bundle and run the GPU check. Arguments are those of `python -m benchmarks.gpu`.
# SAMOVAR_GPU_HOME is the directory to unpack to. If OUT is set, the results are copied to it.
set -eu
cd "$(dirname "$0")/../.."
home=${SAMOVAR_GPU_HOME:-/tmp/samovar-gpu}
python3 -m benchmarks.gpu.unpack --home "$home"
export PYTHONPATH="$home/onnxruntime:$home/site:$PWD:$PWD/clients/python"
export SAMOVAR_TEST_ARTIFACTS="$home/test-artifacts"
status=0
python3 -m benchmarks.gpu --artifacts "$home/artifacts" --out "$home/results" "$@" || status=$?
if [ -n "${OUT:-}" ]; then
    cp "$home"/results/gpu.md "$home"/results/*.json "$OUT"
fi
exit $status
