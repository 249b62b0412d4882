"""The machine, the versions and the commit of a measurement."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.paths import ROOT

SOURCES = ("sfr", "examples", "benchmarks", ":(exclude)benchmarks/results")  # of which a change is a change of the code


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement: device, versions, commit, date."""
    changed = git("status", "--porcelain", "--", *SOURCES)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "numpy", "numba", "scipy", "pot")},
        "commit": git("rev-parse", "HEAD") + ("+changes" if changed else ""),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def git(*arguments: str) -> str:
    """Return what git prints, nothing where the sources are no repository or there is no git."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
