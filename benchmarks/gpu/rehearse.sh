#!/bin/sh
# Run the GPU check on the CPU as it will run on the GPU machine: in a fresh environment of Python 3.12 that has
# the packages of that machine only, in a copy of the files that travel, and without network.
# PYTHON312 names the interpreter. REHEARSAL is the directory to use; its environment is kept.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON312:-python3.12}
directory=${REHEARSAL:-build/gpu/rehearsal}
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
if [ ! -e "$directory/venv/.ready" ]; then
    "$python" -m venv "$directory/venv"
    "$directory/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        'torch==2.11.*' numpy onnx onnxscript onnxruntime grpcio protobuf prometheus-client jinja2 pyarrow scikit-learn \
        matplotlib tqdm pytest pytest-benchmark pytest-cov pytest-mock anyio hypothesis psutil pillow setuptools
    touch "$directory/venv/.ready"
fi
rm -rf "$directory/home" "$directory/tree"
mkdir -p "$directory/tree/build/gpu"
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- | tar --extract --directory "$directory/tree"
cp -r build/gpu/bundle "$directory/tree/build/gpu/"
export PATH="$directory/venv/bin:$PATH" SAMOVAR_GPU_HOME="$directory/home"
# A network namespace of its own has no network but the loopback interface.
exec unshare --net --map-root-user sh -c 'ip link set lo up && exec "$0" --device cpu "$@"' \
    "$directory/tree/benchmarks/gpu/check.sh" "$@"
