"""What pytest leaves out where an optional dependency is missing, and how Triton runs without a GPU."""

import os
from importlib.util import find_spec

import torch

OPTIONAL = {
    "numba": ["sfr/transport/assignment.py"],
    "triton": ["sfr/transport/fused.py", "sfr/feature/fused.py", "sfr/feature/kernels.py"],
}
collect_ignore = [path for package, paths in OPTIONAL.items() if not find_spec(package) for path in paths]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be set before Triton is imported
