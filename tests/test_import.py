"""``import sfr`` pulls in torch, numpy and POT, and none of the packages that only examples need."""

import subprocess
import sys


def test_import_needs_torch_numpy_and_pot_only():
    code = (
        "import sys, sfr\n"
        "optional = {'torchvision', 'accelerate', 'datasets', 'evaluate', 'timm', 'sklearn', 'matplotlib', 'transformers'}\n"
        "print(sorted(optional & set(sys.modules)), bool({'torch', 'numpy', 'ot'} - set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[] False"
