#!/usr/bin/env bash
# What only a GPU can show, in one command and about ten minutes: bash benchmarks/gpu.sh
# Correctness of the device's paths first, then the solvers, then what a training step costs.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -p no:cacheprovider tests/test_gpu.py tests/test_fused.py
python benchmarks/transport.py --device cuda --batch-size 256
overhead=(python benchmarks/overhead.py --device cuda --precision bf16 --channels-last --repeats 50)
"${overhead[@]}" --models resnet18 --output benchmarks/results/overhead-cuda-resnet18.json
"${overhead[@]}" --models resnet50 --image-size 224 --output benchmarks/results/overhead-cuda-resnet50-224.json
