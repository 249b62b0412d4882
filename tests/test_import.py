"""``import sfr`` loads torch and numpy; POT and the compiler wait until used; what examples need is not loaded."""

import subprocess
import sys

OTHERS = ["ot", "torch._dynamo", "scipy.optimize", "sklearn", "torchvision", "accelerate", "datasets", "evaluate"]
OTHERS += ["timm", "matplotlib"]


def test_import_loads_nothing_but_torch_and_numpy():
    code = f"import sys, sfr; print([name for name in {OTHERS} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
