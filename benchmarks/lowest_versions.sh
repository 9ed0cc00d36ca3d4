#!/usr/bin/env bash
# Run the tests with the lowest torch that pyproject.toml allows: 2.6.0 for all but ONNX, 2.11.0 for ONNX.
# PyPI's older torch wheels are CUDA builds of several GB.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
for version in 2.6.0 2.11.0; do
    python3 -m venv "$work/$version"
    sed "s/^torch==.*/torch==$version/" constraints.txt > "$work/constraints-$version.txt"
    extras=$([ "$version" = 2.6.0 ] && echo "dev" || echo "onnx,dev")
    "$work/$version/bin/pip" install -q -c "$work/constraints-$version.txt" ".[$extras]"
done
"$work/2.6.0/bin/python" -m pytest -q -m "not slow" tests/distillation tests/layers tests/test_roundtrip.py tests/test_checkpoint.py
"$work/2.11.0/bin/python" -m pytest -q -m "not slow" tests/quantization tests/evaluation/test_exports.py
