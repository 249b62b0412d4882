"""``import sfr`` loads torch and numpy; POT and the compiler wait until used; what examples need is not loaded."""

import subprocess
import sys

OTHERS = ["ot", "torch._dynamo", "scipy.optimize", "sklearn", "torchvision", "accelerate", "datasets", "evaluate"]
OTHERS += ["timm", "matplotlib"]


FRAMEWORKS = ["transformers", "lightning", "timm"]


def test_import_loads_nothing_but_torch_and_numpy_and_the_integrations_no_framework():
    loaded = "print([name for name in {} if name in sys.modules])"
    code = f"import sys, sfr; {loaded.format(OTHERS)}; import sfr.integrations; {loaded.format(FRAMEWORKS)}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n[]\n"
