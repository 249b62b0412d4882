#!/usr/bin/env bash
# What only a GPU can show, in one command: bash benchmarks/gpu.sh [folder of CIFAR-100's Parquet files]
# Correctness of the device's paths first, then the solvers, then what a training step costs: about ten minutes.
# With the folder also the accuracy of ResNet-18 over 200 epochs, arm by arm: hours, resumed by the same command.
set -euo pipefail
data=${1:+$(cd "$1" && pwd)}
cd "$(dirname "$0")/.."
python -m pytest -p no:cacheprovider tests/test_gpu.py tests/transport/test_fused.py
python -m benchmarks.transport --device cuda --batch-size 256
overhead=(python -m benchmarks.step_cost.overhead --device cuda --precision bf16 --channels-last --repeats 50)
"${overhead[@]}" --models resnet18 --output benchmarks/results/overhead-cuda-resnet18.json
"${overhead[@]}" --models resnet50 --image-size 224 --output benchmarks/results/overhead-cuda-resnet50-224.json
if [ -n "$data" ]; then
    python -m benchmarks.accuracy --device cuda --data-dir "$data" --plan gpu
    python -m benchmarks.step_cost.arm_costs --device cuda --data-dir "$data" --schedule full-200 --model resnet18
    python -m benchmarks.accuracy.report
fi
