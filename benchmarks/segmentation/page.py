"""The tables of docs/segmentation.md."""

from __future__ import annotations

import json
from itertools import groupby

from benchmarks.common.cells import Record
from benchmarks.common.paired import differences, spread, with_error
from benchmarks.common.paths import DOCS, RESULTS
from benchmarks.common.tables import markdown_table, page_with

CELLS = RESULTS / "segmentation"
PAGE = DOCS / "segmentation.md"
MARK = "<!-- the tables below are made by `python -m benchmarks.segmentation --report` -->"
HEADS = ["arm", "seeds", "mIoU, %", "against vanilla", "pixels right, %", "mIoU of the training images, %"]


def write_page() -> None:
    """Write the page's tables anew."""
    parts = [section(list(own)) for _, own in groupby(read_cells(), key=kind)]
    PAGE.write_text(page_with(PAGE, "\n\n".join(parts) or "No cell has been run.", MARK))
    print(f"wrote {PAGE}")


def read_cells() -> list[Record]:
    """Return all cells, those that are compared next to each other, vanilla first."""
    records: list[Record] = [json.loads(file.read_text()) for file in CELLS.glob("*/*.json")]
    return sorted(records, key=lambda record: (kind(record), record["arm"] != "vanilla", record["arm"], record["seed"]))


def miou_by_arm(model: str, plan: str = "cpu", part: str = "test") -> dict[str, dict[int, float]]:
    """Return the mean IoU of a model's cells, by arm and seed."""
    own = [each for each in read_cells() if (each["part"], each["model"], each["plan"]) == (part, model, plan)]
    return {arm: miou(results) for arm, results in results_by_arm(own).items()}


def kind(record: Record) -> tuple[str, ...]:
    """Return what cells must share to be compared."""
    return record["part"], record["model"], record["plan"], json.dumps(record["recipe"], sort_keys=True)


def section(records: list[Record]) -> str:
    """Return what is said of the cells of one kind."""
    some, recipe, machine = records[0], records[0]["recipe"], records[0]["environment"]
    return "\n\n".join(
        [
            f"## {some['model']}, judged on the {some['part']} part",
            f"`--plan {some['plan']} --models {some['model']} --part {some['part']}`: {recipe['epochs']} epochs in "
            f"batches of {recipe['batch_size']}, learning rate {recipe['lr']:g}, weight decay "
            f"{recipe['weight_decay']:g}, {recipe['precision']}; torch {machine['versions']['torch']}, commit "
            f"{machine['commit'][:7]}, {some['seconds'] / 60:.0f} minutes a training of {some['arm']}.",
            markdown_table(HEADS, rows(records)),
        ]
    )


def rows(records: list[Record]) -> list[list[str]]:
    by_arm = results_by_arm(records)
    plain = miou(by_arm.get("vanilla", {}))
    return [
        [
            f"`{arm}`",
            str(len(own)),
            spread([100 * value for value in miou(own).values()]),
            "" if arm == "vanilla" else with_error(differences(miou(own), plain)),
            spread([100 * result["pixel_accuracy"] for result in own.values()]),
            spread([100 * result["train_miou"] for result in own.values()]),
        ]
        for arm, own in by_arm.items()
    ]


def results_by_arm(records: list[Record]) -> dict[str, dict[int, Record]]:
    """Return the results of cells of one kind, by arm and seed."""
    arms = groupby(records, key=lambda record: str(record["arm"]))
    return {arm: {record["seed"]: record["result"] for record in own} for arm, own in arms}


def miou(results: dict[int, Record]) -> dict[int, float]:
    return {seed: result["miou"] for seed, result in results.items()}
