#!/usr/bin/env bash
# Opens layouts by the libraries that want other versions than effc's own environment has: sentence-transformers with
# optimum in a venv, transformers.js in a folder of Node. Both lie in build/, and are made once.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x build/st/bin/python ]; then
    .venv/bin/python -m venv build/st
    build/st/bin/python -m pip install --quiet torch==2.13.0 'sentence-transformers[onnx]==5.7.0'
fi
if command -v npm > /dev/null; then
    mkdir -p build/js
    npm install --silent --no-audit --no-fund --ignore-scripts --prefix build/js @huggingface/transformers@4.3.2
    export EFFC_NODE="$PWD/build/js"
fi
EFFC_ST_PYTHON="$PWD/build/st/bin/python" .venv/bin/python -m pytest -q tests/test_layout_encoder.py tests/test_layout.py
