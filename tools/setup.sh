#!/bin/sh
# Compiles lora_ext into the environment BIN, with packages for tests and lint: these come from the
# package index while it compiles. The build folder is kept, and the second build incremental; it
# needs the environment's ninja, so there is no isolation.
set -eu
cd "$(dirname "$0")/.."
"$BIN/python" tools/extra.py dependencies test lint >build/requirements.txt
"$BIN/python" setup.py build_ext --inplace &
compiling=$!
trap 'kill $compiling 2>/dev/null || true' EXIT
"$BIN/pip" install -r build/requirements.txt
wait $compiling
trap - EXIT
"$BIN/pip" install -v --no-build-isolation --no-deps --editable .
