#!/usr/bin/env bash
# What a machine with a GPU should answer, in one go: GPU tests, kernel timings, step time, a longer distillation.
# Prints short tables; JSON, plots and reports go to OUT.
#
#     OUT=results bash benchmarks/gpu.sh [tests] [kernels] [steps] [train] [peers] [tune] (default: the first four, about 25 minutes)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-results}
PYTHON=${PYTHON:-python}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} PYTHONPATH=${PYTHONPATH:-.}
mkdir -p "$OUT"
failed=()

part() { # name, seconds, command ...
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.log" | tail -40
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed+=("$name ($status)")
}

for wanted in "${@:-tests kernels steps train}"; do
    for what in $wanted; do
        case $what in
            tests) part tests 300 "$PYTHON" -m pytest -q -m gpu -x tests ;;
            kernels) part kernels 540 "$PYTHON" benchmarks/kernels.py --device cuda --peers none --out "$OUT" ;;
            peers) # some tune or compile for minutes at their first call
                for peer in ${PEERS:-gemlite humming vllm triton_kernels liger}; do
                    part "peers-$peer" 580 "$PYTHON" benchmarks/kernels.py --device cuda --peers "$peer" --out "$OUT/$peer"
                done
                ;;
            steps)
                for model in embedded llama-1b; do
                    part "steps-$model" 300 "$PYTHON" benchmarks/step_time.py --device cuda --model $model --tokens 4096 \
                        --json "$OUT/steps-$model.json"
                done
                ;;
            train) part train 540 "$PYTHON" benchmarks/recovery.py precision=bf16-mixed steps=400 rows=8 ;;
            tune) part tune 590 "$PYTHON" benchmarks/tune.py && cp -r kernels/tuned "$OUT/" ;;
            *) echo "no part called $what; there are tests, kernels, steps, train, peers and tune" >&2; exit 2 ;;
        esac
    done
done
[ ${#failed[@]} -eq 0 ] && echo "all parts ran" || { echo "failed: ${failed[*]}"; exit 1; }
