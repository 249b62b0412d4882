"""A GPU for Triton on machines without one: launches are compiled and checked as for it, and nothing runs.

That is for a process of its own, whose Triton is not the interpreter: `run_for_a_gpu(script)` starts one, which calls
`on_a_gpu` first.
"""

import contextlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def run_for_a_gpu(script: str, cache: Path) -> list[str]:
    """Return the lines that a script prints in a process of its own, in which launches are compiled for a GPU.

    Args:
        script: may use `launches`, a counter of the launches of each kernel.
        cache: folder for what is compiled.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    beginning = "from gpu_not_there import on_a_gpu\nlaunches = on_a_gpu()\n"
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", beginning + script],
        env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def on_a_gpu() -> Counter[str]:
    """Let Triton compile for a GPU, and tensors pass for its; return a counter of what would have been launched."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction

    class Driver:
        """Every other launch of a kernel is for an older GPU."""

        launched = 0

        def get_current_device(self) -> int:
            return self.launched % 2

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", (80, 90)[self.launched % 2], 32)

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

        def is_active(self) -> bool:
            return True

    driver, launches = Driver(), Counter[str]()
    triton.runtime.driver.set_active(driver)
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        driver.launched += 1
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assert len(kernel.asm["cubin"]) > 1000
        launches[self.fn.__name__] += 1
        return kernel

    JITFunction.run = compile_only
    torch.Tensor.is_cuda, torch.Tensor.is_cpu = True, False
    torch.cuda.device_of = lambda _: contextlib.nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False
    return launches
