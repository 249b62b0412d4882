"""Tables of what `python -m benchmarks.accuracy.diagnose` has found inside the feature term."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common.tables import markdown_table

HEAD = """\
## Inside the feature term

One batch of training images, every few epochs of one run (`python -m benchmarks.accuracy.diagnose --help` says what is
what). EMD-l2 is given as a share of the cost of the independent coupling, that is, of no matching; a plan that knew
nothing of places would leave one sixteenth, 6 %, in place. The gradient is that of the weighted feature term on a
stage's parameters, as a share of the label term's."""


def diagnosis_tables(results: Path) -> list[str]:
    """Return the tables of all runs looked into below a folder; nothing if there are none."""
    records = [json.loads(file.read_text()) for file in sorted(results.glob("diagnosis-*.json"))]
    return [HEAD, *map(run_table, records)] if records else []


def run_table(record: dict[str, Any]) -> str:
    cell, findings = record["cell"], record["findings"]
    pairs, stages = list(findings[0]["pairs"]), list(findings[0]["stages"])
    heads = ["epoch", *(f"EMD {name}" for name in pairs), *(f"in place {name}" for name in pairs)]
    heads += [f"rms {name}" for name in stages] + [f"gradient {name}" for name in stages[:-1]]
    title = f"`{cell['arm']}`, seed {cell['seed']}, schedule {cell['schedule']}, {cell['model']} on {cell['dataset']}"
    table = markdown_table(heads, (finding_row(finding, pairs, stages) for finding in findings))
    return f"{title}; gradients for a weight of {record['weight']}:\n\n{table}"


def finding_row(finding: dict[str, Any], pairs: list[str], stages: list[str]) -> list[str]:
    matched = [finding["pairs"][name] for name in pairs]
    tapped = [finding["stages"][name] for name in stages]
    return [
        str(finding["epoch"]),
        *(f"{pair['emd'] / pair['independent']:.0%}" for pair in matched),
        *(f"{pair['in_place']:.0%}" for pair in matched),
        *(f"{stage['rms']:.2f}" for stage in tapped),
        *(f"{stage['feature_gradient'] / stage['label_gradient']:.0%}" for stage in tapped[:-1]),
    ]
