"""Finished cells of the accuracy benchmark, in groups that may be compared with each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

Record = dict[str, Any]
Measure = Callable[[Record], float]
Scores = dict[int, float]  # by seed
LATER_FIELDS = {"optimizer": "sgd", "precision": "bf16"}  # of a schedule, which the oldest records do not name


@dataclass(frozen=True)
class Group:
    """Cells that may be compared with each other: they differ in arm and seed only."""

    records: Sequence[Record]
    costs: Mapping[str, Mapping[str, float]]

    @property
    def cell(self) -> Record:
        return self.records[0]["cell"]

    @property
    def schedule(self) -> Record:
        return self.records[0]["schedule"]

    @property
    def network(self) -> str:
        return f"{self.cell['model']} on {self.cell['dataset']}"

    @property
    def title(self) -> str:
        return f"{self.network}, schedule {self.cell['schedule']}"

    @property
    def is_test(self) -> bool:
        return self.cell["part"] == "test"

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(record["cell"]["arm"] for record in self.records))

    def scores(self, arm: str, measure: Measure | None = None) -> Scores:
        """Return, by seed, what is measured of an arm's cells; by default the accuracy."""
        measure = measure or result("accuracy")
        return {record["cell"]["seed"]: measure(record) for record in self.records if record["cell"]["arm"] == arm}


def result(name: str) -> Measure:
    return lambda record: record["result"][name]


def on_corrupted(severity: str, kinds: Sequence[str]) -> Measure:
    return lambda record: mean(record["corrupted"]["severity"][severity][kind] for kind in kinds)


def read_groups(results: Path) -> list[Group]:
    """Return all cells below a folder in groups, the test parts first."""
    records = [json.loads(file.read_text()) for file in results.glob("*/*.json")]
    costs = [entry for file in sorted(results.glob("costs-*.json")) for entry in json.loads(file.read_text()).values()]
    found = groupby(sorted(records, key=sort_key), key=lambda record: sort_key(record)[:-2])
    return [Group(cells, costs_of(cells[0], costs)) for cells in (list(cells) for _, cells in found)]


def sort_key(record: Record) -> tuple[Any, ...]:
    """Return what groups the cells, then arm and seed; settings count, for a schedule's name may outlive them."""
    cell = record["cell"]
    kind = (
        cell["part"] != "test",
        cell["dataset"],
        cell["model"],
        cell["schedule"],
        json.dumps(LATER_FIELDS | record["schedule"], sort_keys=True),
    )
    return (*kind, cell["arm"], cell["seed"])


def costs_of(record: Record, measured: Iterable[Record]) -> dict[str, Mapping[str, float]]:
    """Return the costs by arm that were measured on such images and steps, on the same kind of device.

    Of an arm that was measured twice the measurement with more steps counts.
    """

    def kind(of: Record, names: Record) -> list[Any]:
        settings = [of["schedule"][name] for name in ("image_size", "batch_size", "augmentation")]
        return [*settings, of["environment"]["device"], names["model"], names["dataset"]]

    alike = [entry for entry in measured if kind(entry, entry["settings"]) == kind(record, record["cell"])]
    alike.sort(key=lambda entry: entry["settings"]["repeats"])
    return {arm: cost for entry in alike for arm, cost in entry["arms"].items()}
