"""Tables and plot of the accuracy benchmark, from the JSON of its cells.

    python benchmarks/report.py            # writes the tables of README.md and docs/accuracy.md, and the plot
    python benchmarks/report.py --check    # writes nothing; fails and names the pages that the JSON has outdated

Cells are compared within one data set, model, schedule and part, and never across. A row is there for each arm that has
cells; an arm that neither PEERS nor LADDER names is a row of the variants, so that none is left out. Words around the
two markers of a page are written by hand and stay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean, median
from typing import Any

from paired import differences, spread, standard_error, with_error

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "accuracy.md"
PLOT = ROOT / "docs" / "accuracy-cost.png"
BEGIN = "<!-- from here to the end mark, benchmarks/report.py writes -->"
END = "<!-- end of what benchmarks/report.py writes -->"

BASE, OURS = "vanilla", "sfr"
PEERS = {
    BASE: "vanilla",
    "label-smoothing": "label smoothing 0.1",
    "online-label-smoothing": "online label smoothing",
    "tf-kd-reg": "Tf-KD_reg",
    "cs-kd": "CS-KD",
    "ps-kd": "PS-KD",
    "dlb": "DLB",
    "byot": "BYOT",
    "tfd": "TFD",
    "cutmix": "CutMix",
    "vanilla-longer@factor=1.02": "vanilla, as long as sfr",
    OURS: "**sfr**",
    "sfr-cutmix": "**sfr + CutMix**",
}
LADDER = {
    BASE: "vanilla",
    "tfd": "plain l2, channel to channel",
    "tfd@grouping=segments": "plain l2, many to one",
    "sfr@smoothing=none,grouping=crop": "EMD-l2, channel to channel",
    "sfr@smoothing=none,grouping=mean": "EMD-l2, many to one (mean)",
    "sfr@smoothing=none": "EMD-l2, many to one (segments)",
    "sfr@weight=0": "dynamic label smoothing alone",
    OURS: "**sfr**: all of it",
    "cutmix": "CutMix",
    "sfr-cutmix": "**sfr + CutMix**",
}
MAIN_SCHEDULES = ("tenth", "tenth-16px", "full-30", "full-200")  # of which the README shows the test part
MAIN_ARMS = (BASE, "label-smoothing", "tfd", "byot", "cs-kd", "ps-kd", "vanilla-longer@factor=1.02", OURS)
NAMES = {**LADDER, **PEERS}
SEVERITIES = ("1", "3", "5")

LEGEND = """\
Accuracy in % at the last epoch, mean ± standard deviation over the seeds. "Against vanilla" is the difference in points
paired by seed, mean ± standard error (the seeds are counted where they are not all paired). ECE is the expected
calibration error. Time and memory are those of training, relative to vanilla's (`python benchmarks/arm_costs.py`)."""
NOTHING_YET = (
    "No cells have been run yet: `python benchmarks/accuracy.py` runs them, `benchmarks/report.py` writes here."
)

Record = dict[str, Any]
Measure = Callable[[Record], float]
Scores = dict[int, float]  # by seed


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
    def is_test(self) -> bool:
        return self.cell["part"] == "test"

    @property
    def is_main(self) -> bool:
        return self.is_test and self.cell["schedule"] in MAIN_SCHEDULES

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(record["cell"]["arm"] for record in self.records))

    @property
    def variants(self) -> list[str]:
        """The arms that no other table has, and what they are compared with: the best first."""
        tried = [arm for arm in self.arms if arm not in NAMES]
        known = [arm for arm in self.arms if arm in (BASE, "label-smoothing", OURS)]
        return sorted([*known, *tried], key=lambda arm: -mean(self.scores(arm).values())) if tried else []

    def scores(self, arm: str, measure: Measure = lambda record: record["result"]["accuracy"]) -> Scores:
        return {record["cell"]["seed"]: measure(record) for record in self.records if record["cell"]["arm"] == arm}


def main() -> None:
    """Write the pages and the plot, or say which pages are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is out of date")
    check = parser.parse_args().check
    groups = read_groups(RESULTS)
    outdated = {page: text for page, text in pages(groups).items() if page.read_text() != text}
    if check and outdated:
        names = ", ".join(str(page.relative_to(ROOT)) for page in outdated)
        raise SystemExit(f"out of date: {names}; python benchmarks/report.py writes them anew")
    if check:
        return
    for page, text in outdated.items():
        page.write_text(text)
    draw([group for group in groups if group.is_main and points(group)], PLOT)


def read_groups(results: Path) -> list[Group]:
    """Return all cells below a folder in groups, the test parts first."""
    records = [json.loads(file.read_text()) for file in results.glob("*/*.json")]
    costs = [entry for file in sorted(results.glob("costs-*.json")) for entry in json.loads(file.read_text()).values()]
    found = groupby(sorted(records, key=sort_key), key=lambda record: sort_key(record)[:-2])
    return [Group(cells, costs_of(cells[0], costs)) for cells in (list(cells) for _, cells in found)]


def sort_key(record: Record) -> tuple[Any, ...]:
    """Return what groups the cells, then arm and seed; settings count, for a schedule's name may outlive them."""
    cell = record["cell"]
    kind = (cell["part"] != "test", cell["dataset"], cell["model"], cell["schedule"], json.dumps(record["schedule"]))
    return (*kind, cell["arm"], cell["seed"])


def costs_of(record: Record, measured: Iterable[Record]) -> dict[str, Mapping[str, float]]:
    """Return the costs by arm that were measured on such images and steps, on the same kind of device."""

    def kind(of: Record, names: Record) -> list[Any]:
        settings = [of["schedule"][name] for name in ("image_size", "batch_size", "augmentation")]
        return [*settings, of["environment"]["device"], names["model"], names["dataset"]]

    alike = [entry for entry in measured if kind(entry, entry["settings"]) == kind(record, record["cell"])]
    return {arm: cost for entry in alike for arm, cost in entry["arms"].items()}


def pages(groups: Sequence[Group]) -> dict[Path, str]:
    """Return the pages with their generated parts anew."""
    return {README: inserted(README, readme_part(groups)), PAGE: inserted(PAGE, page_part(groups))}


def inserted(page: Path, generated: str) -> str:
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} must have the lines {BEGIN!r} and {END!r}, between which the tables belong")
    return f"{before}{begin}\n\n{generated}\n\n{end}{after}"


def readme_part(groups: Sequence[Group]) -> str:
    main_groups = [group for group in groups if group.is_main]
    parts = [f"{facts(group)}\n\n{arms_table(group, MAIN_ARMS)}{not_run(group)}" for group in main_groups]
    return "\n\n".join([LEGEND, *parts]) if parts else NOTHING_YET


def page_part(groups: Sequence[Group]) -> str:
    if not groups:
        return NOTHING_YET
    plot = [f"![gain over vanilla against training time]({PLOT.name})"] if any(map(points, groups)) else []
    return "\n\n".join([LEGEND, *plot, *map(section, groups), *robustness([g for g in groups if g.is_test])])


def section(group: Group) -> str:
    """Return all there is to say of one group."""
    tables = {
        "Peers": arms_table(group, PEERS, rival=OURS) + not_run(group),
        "The ladder": arms_table(group, LADDER),
        "Variants, the best first": arms_table(group, group.variants),
    }
    parts = [f"### {name}\n\n{table}" for name, table in tables.items() if table]
    judged_on = "test set" if group.is_test else "held-out part of the training set"
    title = f"## {group.network}, schedule {group.cell['schedule']}, {judged_on}"
    return "\n\n".join([title, facts(group), *parts])


def facts(group: Group) -> str:
    """Return in a few lines what was trained, on what, with which versions."""
    cell, schedule = group.cell, group.schedule
    per_class = schedule["per_class"]
    labels = "all labels" if per_class is None else f"{per_class} labelled images a class"
    noise = f", {schedule['label_noise']:.0%} of the labels wrong" if schedule["label_noise"] else ""
    seen = [record["environment"] for record in group.records]
    versions = distinct(", ".join(f"{k} {v}" for k, v in one["versions"].items()) for one in seen)
    speeds = [record["images_per_second"] for record in group.records if record["cell"]["arm"] == BASE]
    return "\n".join(
        [
            f"`--model {cell['model']} --dataset {cell['dataset']} --schedule {cell['schedule']} "
            f"--part {cell['part']}`: {schedule['epochs']} epochs, {labels}{noise}, "
            f"{schedule['image_size']} x {schedule['image_size']} pixels, {schedule['augmentation']}, "
            f"batch {schedule['batch_size']}, learning rate {schedule['lr']}, "
            f"weight decay {schedule['weight_decay']}.",
            f"Seeds {', '.join(map(str, sorted({record['cell']['seed'] for record in group.records})))}; "
            f"{distinct(one['device'] for one in seen)}; {versions}; "
            f"commit {distinct(one['commit'][:7] + '+' * one['commit'].endswith('+changes') for one in seen)}."
            + (f" A cell of vanilla trains on {median(speeds):.0f} images/s." if speeds else ""),
        ]
    )


def named(arm: str) -> str:
    return NAMES.get(arm, f"`{arm}`")


def distinct(values: Iterable[str]) -> str:
    return " / ".join(sorted(set(values)))


def arms_table(group: Group, arms: Mapping[str, str] | Sequence[str], rival: str | None = None) -> str:
    """Return one row for each arm that has cells; nothing if there are none besides vanilla."""
    names = dict(arms) if isinstance(arms, Mapping) else {arm: named(arm) for arm in arms}
    shown = [arm for arm in names if arm in group.arms]
    if not set(shown) - {BASE}:
        return ""
    heads = ["arm", "accuracy, %", "against vanilla", "top-5, %", "ECE, %", "time", "memory", "seeds"]
    rows = [[names[arm], *row(group, arm)] for arm in shown]
    if rival in group.arms:
        heads.insert(3, f"{rival} against it")
        for arm, cells in zip(shown, rows, strict=True):
            cells.insert(3, gain(group.scores(rival), group.scores(arm)) if arm not in (BASE, rival) else "")
    return markdown(heads, rows)


def row(group: Group, arm: str) -> list[str]:
    accuracies = group.scores(arm)
    top5, ece = (group.scores(arm, lambda record, key=key: record["result"][key]).values() for key in ("top5", "ece"))
    cost = group.costs.get(arm)
    ratios = [f"{cost[name]:.2f}x" for name in ("time_ratio", "memory_ratio")] if cost else ["", ""]
    return [
        in_percent(accuracies),
        "" if arm == BASE else gain(accuracies, group.scores(BASE)),
        f"{100 * mean(top5):.1f}",
        f"{100 * mean(ece):.1f}",
        *ratios,
        str(len(accuracies)),
    ]


def gain(scores: Scores, reference: Scores) -> str:
    """Return the mean paired difference in points ± its standard error, and its seeds if not all are paired."""
    paired = differences(scores, reference)
    partly = paired and len(paired) < max(len(scores), len(reference))
    return with_error(paired) + (f" ({len(paired)} paired)" if partly else "")


def in_percent(scores: Scores) -> str:
    return spread([100 * score for score in scores.values()])


def not_run(group: Group) -> str:
    """Name the main arms without a cell; on the held-out part choices are made, and not all arms belong there."""
    missing = [named(arm) for arm in MAIN_ARMS if arm not in group.arms]
    return f"\n\nNot run: {', '.join(missing)}." if missing and group.is_test else ""


def robustness(groups: Sequence[Group]) -> list[str]:
    """Return the tables of few and of wrong labels, schedule beside schedule, and those of corrupted test images."""
    parts = []
    for name, alike in groupby(groups, key=lambda group: group.network):
        hard = [group for group in alike if group.schedule["per_class"] or group.schedule["label_noise"]]
        columns = [(group.cell["schedule"], {arm: group.scores(arm) for arm in group.arms}) for group in hard]
        parts += [f"### Few and wrong labels: {name}\n\n{side_by_side(columns)}"] if hard else []
    parts += [corruptions(group) for group in groups if any("corrupted" in record for record in group.records)]
    head = "## Robustness\n\nAccuracy in % on the test set, in brackets against vanilla, as above."
    return [head, *parts] if parts else []


def corruptions(group: Group) -> str:
    """Return the accuracies on corrupted images by severity, each the mean over the corruptions that all cells have."""
    judged = Group([record for record in group.records if "corrupted" in record], group.costs)
    found = [set(record["corrupted"]["severity"][k]) for record in judged.records for k in SEVERITIES]
    kinds = sorted(set.intersection(*found))
    columns = []
    for severity in SEVERITIES:

        def measure(record: Record, severity: str = severity) -> float:
            return mean(record["corrupted"]["severity"][severity][kind] for kind in kinds)

        columns.append((f"severity {severity}", {arm: judged.scores(arm, measure) for arm in judged.arms}))
    title = f"### Corrupted images: {group.network}, schedule {group.cell['schedule']}"
    return f"{title}\n\nMean over {', '.join(kinds)}.\n\n{side_by_side(columns)}"


def side_by_side(columns: Sequence[tuple[str, Mapping[str, Scores]]]) -> str:
    """Return accuracies and gains by arm, one column for each of the named groups of scores."""
    there = dict.fromkeys(arm for _, scores in columns for arm in scores)
    rows = []
    for arm in sorted(there, key=lambda arm: (*NAMES, *there).index(arm)):
        cells = []
        for _, scores in columns:
            gained = gain(scores[arm], scores.get(BASE, {})) if arm in scores and arm != BASE else ""
            cells.append(in_percent(scores.get(arm, {})) + (f" ({gained})" if gained else ""))
        rows.append([named(arm), *cells])
    return markdown(["arm", *(name for name, _ in columns)], rows)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def points(group: Group) -> dict[str, list[float]]:
    """Return the paired gains over vanilla of the arms whose cost is known."""
    gains = {arm: differences(group.scores(arm), group.scores(BASE)) for arm in NAMES if arm != BASE}
    return {arm: paired for arm, paired in gains.items() if paired and arm in group.costs}


def draw(groups: Sequence[Group], path: Path) -> None:
    """Plot gain against training time, one panel a group; nothing without groups."""
    if not groups:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(groups), figsize=(7, 4.5 * len(groups)), squeeze=False, layout="constrained")
    for group, axes in zip(groups, panels.flat, strict=True):
        axes.axhline(0, color="0.6", linewidth=1)
        for arm, gains in points(group).items():
            time, height = group.costs[arm]["time_ratio"], mean(gains)
            colour = "tab:red" if arm.partition("@")[0] in (OURS, "sfr-cutmix") else "tab:blue"
            axes.errorbar(time, height, yerr=standard_error(gains) or 0, fmt="o", color=colour, capsize=3)
            axes.annotate(named(arm).replace("*", ""), (time, height), (6, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="training time, relative to vanilla", ylabel="gain over vanilla, points")
        axes.set_title(f"{group.network}, schedule {group.cell['schedule']}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.margins(0.15)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
