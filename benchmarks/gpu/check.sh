#!/usr/bin/env bash
# Unpack the bundle and run the GPU check. Arguments are those of `python -m benchmarks.gpu`.
# `check.sh --receive FILE ...` stores pieces of onnxruntime-gpu instead, which may arrive one by one.
# SAMOVAR_GPU_HOME is the directory to unpack to. If OUT names a directory, results are copied to it.
set -euo pipefail
cd "$(dirname "$0")/../.."
home=${SAMOVAR_GPU_HOME:-/tmp/samovar-gpu}
results=$home/results
if [ "${1:-}" = --receive ]; then
    shift
    exec python3 -m benchmarks.gpu.unpack --home "$home" --receive "$@"
fi

# Copy the results to OUT: the page, one file a part, and the small files of the parts in one archive.
copy_results() {
    cp "$results"/*.json "$results"/check.log "$results"/gpu.md "$OUT" || true
    (cd "$results" && find files -size -4096k \( -name '*.log' -o -name '*.csv' -o -name '*.jsonl' -o -name output \) |
        tar --create --gzip --ignore-failed-read --file "$OUT/logs.tar.gz" --files-from=-) || true
} 2> /dev/null

python3 -m benchmarks.gpu.unpack --home "$home"
# The checkout comes before the wheel of the client, which is there for its metadata.
export PYTHONPATH="$home/onnxruntime:$PWD:$PWD/clients/python:$home/site"
export SAMOVAR_TEST_ARTIFACTS="$home/test-artifacts"
mkdir -p "$results"
if [ -n "${OUT:-}" ]; then
    # A run that is killed must leave what it has found.
    while sleep 5 && kill -0 $$; do copy_results; done > /dev/null 2>&1 &
    copier=$!
    trap 'kill $copier; copy_results' EXIT
fi
status=0
python3 -m benchmarks.gpu --artifacts "$home/artifacts" --out "$results" "$@" 2>&1 | tee "$results/check.log" || status=$?
exit $status
