"""Where the repository keeps what benchmarks read and write."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / "benchmarks" / ".cache"
DOCS = ROOT / "docs"
README = ROOT / "README.md"
