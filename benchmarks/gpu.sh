#!/usr/bin/env bash
# What only a GPU can show, in order of worth, within a budget of time; what is done is kept and not run again.
#
#     bash benchmarks/gpu.sh [--minutes 9] [--out benchmarks/results/gpu] [--data-dir FOLDER] [--tiny]
#
# FOLDER holds CIFAR-100's Parquet files; without it there is no accuracy and no drawing. --tiny tries every line on the CPU.
set -euo pipefail
minutes=9 out="" data="" tiny=""
while [ $# -gt 0 ]; do
    case "$1" in
        --minutes) minutes=$2 && shift 2 ;;
        --out) out=$2 && shift 2 ;;
        --data-dir) data=$(cd "$2" && pwd) && shift 2 ;;
        --tiny) tiny=1 && shift ;;
        *) echo "unknown: $1; see the first lines of $0" >&2 && exit 2 ;;
    esac
done
mkdir -p "${out:=$(dirname "$0")/results/gpu}"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."

part() { # NAME FILE COMMAND...: run it unless its file is there; what it writes to is $file
    local name=$1 file=$out/$2 left=$((minutes * 60 - SECONDS)) status=0
    shift 2
    if [ -e "$file" ]; then
        echo "== $name: done before"
    elif [ "$left" -lt 30 ]; then
        echo "== $name: left for the next call, the budget of $minutes minutes is spent"
    else
        echo "== $name (${SECONDS}s)"
        timeout --signal=INT --kill-after=20 "$left" "${@//@FILE/$file}" || status=$?
        [ "$status" = 0 ] || echo "== $name: ended with $status"
        [ "$status" = 124 ] || [ "$status" = 0 ] || failed+=("$name")
    fi
}

failed=()
tests=(tests/test_gpu.py tests/feature/test_fused_term.py tests/labels/test_fused_labels.py tests/transport/test_fused.py)
device=cuda precision=bf16 small=(resnet18:32:128) large=(resnet50:224:64 vit_small_patch16_224:224:64)
repeats=(--repeats 30) solvers=(--batch-size 256) accuracy=(--plan gpu) flow=(--plan gpu)
if [ -n "$tiny" ]; then
    tests=(tests/test_gpu.py) device=cpu precision=fp32
    small=(resnet8:16:4) large=(resnet18:64:2 vit_tiny_patch16_224:32:2)
    repeats=(--repeats 1 --train-steps 1) solvers=(--quick --batch-size 2 --repeats 1 --budget 0.01 --limit 0.02)
    accuracy=(--schedule smoke --model resnet8 --seeds 0) flow=(--plan tiny --arms layersync --seeds 0)
fi
first=(python -m benchmarks.step_cost.overhead --device "$device" --precision "$precision" "${repeats[@]}")
cost=("${first[@]}" --channels-last)
part correctness tests.xml python -m pytest -p no:cacheprovider -p no:benchmark -n 4 --junit-xml @FILE "${tests[@]}"
part "a step of ResNet-18" step-resnet18.json "${cost[@]}" --models "${small[@]}" --output @FILE
part "a step of ResNet-50 and a ViT" step-large.json "${cost[@]}" --models "${large[@]}" --output @FILE
part "replayed steps" step-replayed.json "${cost[@]}" --graph --models "${small[@]}" "${large[@]}" --output @FILE
part "the same, channels first" step-channels-first.json "${first[@]}" --graph --models "${small[@]}" "${large[0]}" \
    --output @FILE
part "compiled steps" step-compiled.json "${cost[@]}" --compile --models "${small[@]}" --output @FILE
part solvers transport.json python -m benchmarks.transport --device "$device" "${solvers[@]}" \
    --output @FILE --plot "$out/transport.png"
if [ -n "$data" ]; then
    part accuracy all-cells python -m benchmarks.accuracy --device "$device" --data-dir "$data" "${accuracy[@]}" \
        --results "$out/accuracy" --cache "$out/cache"
    [ -n "$tiny" ] || flow+=(--data-dir "$data")
fi
if [ -n "$data$tiny" ]; then
    part "flow matching" flow-cells env ACCELERATE_MIXED_PRECISION="${precision/fp32/no}" \
        python -m benchmarks.generative "${flow[@]}" --results "$out/generative" --cache "$out/cache"
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
