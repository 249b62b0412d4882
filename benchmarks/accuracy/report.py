"""Tables and plot of the accuracy benchmark, from the JSON of its cells.

    python -m benchmarks.accuracy.report                 # writes the tables of README.md and docs/accuracy.md, the plot
    python -m benchmarks.accuracy.report --check         # writes nothing; fails and names what is out of date
    python -m benchmarks.accuracy.report --results DIR   # prints other cells' tables, and how they differ from these

Cells are compared within one data set, model, schedule and part, and never across. A row is there for each arm that has
cells; one that neither PEERS nor LADDER names is a row of the variants, so that none is left out. Words around the
two markers of a page are written by hand and stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean, median
from types import MappingProxyType

from benchmarks.accuracy.cell import CELLS
from benchmarks.accuracy.cost_plot import Point, draw, is_drawn
from benchmarks.accuracy.diagnosis_tables import diagnosis_tables
from benchmarks.accuracy.groups import Group, Record, Scores, on_corrupted, read_groups, result
from benchmarks.accuracy.names import (
    BASE,
    EARLIER,
    FEATURES,
    FEW_LABELS,
    FINE_TUNING,
    LADDER,
    NAMES,
    NOISY_LABELS,
    OURS,
    PAST,
    PEERS,
    UNGATED,
    WRONG_LABELS,
    WRONG_LABELS_EARLIER,
    comparable,
)
from benchmarks.accuracy.repeated import repeated
from benchmarks.common.paired import differences, spread, with_error
from benchmarks.common.paths import DOCS, README, ROOT
from benchmarks.common.tables import markdown_table, page_with
from benchmarks.segmentation.page import miou_by_arm

PAGE = DOCS / "accuracy.md"
PLOT = DOCS / "accuracy-cost.png"
BEGIN = "<!-- from here to the end mark, `python -m benchmarks.accuracy.report` writes -->"
END = "<!-- end of what `python -m benchmarks.accuracy.report` writes -->"

RIVALS = {OURS: "sfr", EARLIER: "the earlier default", PAST: "the earlier default with past predictions"}
# Of which the plot shows the test part, in this order.
MAIN_SCHEDULES = ("full-200", "tenth-16px", "tenth", "full-30-16px", "full-30")
SEVERITIES = ("1", "3", "5")

# The rows and columns of the README; of several arms in one column a row shows the first that it has.
SITUATIONS = {
    ("tenth-16px", "resnet20", "cifar100", "test"): "ResNet-20, 10 % of CIFAR-100's labels, 16 px, 100 epochs",
    ("tenth-16px", "resnet20", "cifar100", "held-out"): "the same",
    ("few-16px", "resnet20", "cifar100", "held-out"): "the same, 60 epochs",
    ("tenth", "resnet20", "cifar100", "held-out"): "the same, 32 px, 100 epochs",
    ("noise40-500", "resnet20", "cifar10", "held-out"): "ResNet-20, 10 % of CIFAR-10's labels, 40 % of them wrong",
    ("noise40-16px", "resnet20", "cifar100", "test"): "the same, 20 % of CIFAR-100's labels",
    ("full-30-16px", "resnet20", "cifar100", "held-out"): "ResNet-20, all of CIFAR-100, 16 px, 30 epochs",
    ("full-30", "resnet18", "cifar100", "test"): "ResNet-18, the same, 32 px",
    ("vit", "vit-small-images", "cifar10", "held-out"): "small ViT, 4 % of CIFAR-10's labels",
    ("fine-tune-20", "efficientnet-lite0", "flowers", "test"): "EfficientNet-Lite0 from ImageNet, 100 flowers",
    ("fine-tune-20", "efficientnet-lite0", "elpv", "test"): "the same, 40 solar cells",
}
# Cells of the segmentation benchmark, by model.
DENSE = {"unet": "U-Net, CamVid, mean IoU", "lraspp": "LR-ASPP, the same"}
SUMMED = {"two lines": (OURS,), "its preset": (FEW_LABELS, NOISY_LABELS), "without the gate": (UNGATED,)}
SUMMARY = """\
Gain over plain training in points of accuracy at the last epoch: mean ± standard error (number of seeds), paired by
seed. `python -m benchmarks.accuracy` with the schedule repeats it; [segmentation](docs/segmentation.md) has its own."""

LEGEND = """\
Accuracy in % at the last epoch, mean ± standard deviation over the seeds. "Against vanilla" is the difference in points
paired by seed, mean ± standard error; where only some of the seeds have a pair, it says how many. ECE is the expected
calibration error. Time and memory are those of training, relative to vanilla's
(`python -m benchmarks.step_cost.arm_costs`)."""
NOTHING_YET = """\
No cells have been run yet: `python -m benchmarks.accuracy` runs them, `python -m benchmarks.accuracy.report` writes
here."""


def main() -> None:
    """Write the pages and the plot, or say which of them are out of date."""
    args = parse_arguments()
    if args.results:
        print(other_cells(args.results))
        return
    groups = read_groups(CELLS)
    outdated = {page: text for page, text in pages(groups).items() if page.read_text() != text}
    plot = panels(groups)
    if args.check:
        files = [*outdated, *([PLOT] if plot and not is_drawn(plot, PLOT) else [])]
        names = ", ".join(str(file.relative_to(ROOT)) for file in files)
        raise SystemExit(f"out of date: {names}; python -m benchmarks.accuracy.report writes them anew" if files else 0)
    for page, text in outdated.items():
        page.write_text(text)
    if plot:
        draw(plot, PLOT)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page or the plot is out of date")
    parser.add_argument("--results", type=Path, help="folder of other cells; print what they give, write nothing")
    return parser.parse_args()


def pages(groups: Sequence[Group]) -> dict[Path, str]:
    """Return the pages with their generated parts anew."""
    return {
        README: page_with(README, readme_part(groups, {model: miou_by_arm(model) for model in DENSE}), BEGIN, END),
        PAGE: page_with(PAGE, page_part(groups), BEGIN, END),
    }


def other_cells(results: Path) -> str:
    """Return the tables of the cells in another folder, and those that are recorded here as well beside these.

    Raises:
        SystemExit: if there is no cell.
    """
    groups = read_groups(results)
    if not groups:
        raise SystemExit(f"{results} has no cells; python -m benchmarks.accuracy --results {results} runs them")
    return "\n\n".join([LEGEND, *tables(groups), f"## Beside the recorded cells\n\n{repeated(results, CELLS)}"])


def main_groups(groups: Iterable[Group]) -> list[Group]:
    """Return what the plot shows, in its order."""
    shown = [group for group in groups if group.is_test and group.cell["schedule"] in MAIN_SCHEDULES]
    return sorted(shown, key=lambda group: MAIN_SCHEDULES.index(group.cell["schedule"]))


def panels(groups: Iterable[Group]) -> dict[str, list[Point]]:
    """Return the points of the plot by the titles of its panels."""
    return {group.title: points(group) for group in main_groups(groups) if points(group)}


def readme_part(groups: Sequence[Group], dense: Mapping[str, Mapping[str, Scores]]) -> str:
    """Return one row for each situation that has cells; `dense` has the scores of segmentation by model and arm."""
    rows = [row for key, words in SITUATIONS.items() for row in situation(groups, key, words)]
    rows += [summed(DENSE[model], arms, "(test)") for model, arms in dense.items() if BASE in arms]
    heads = ["trained", "plain, %", *SUMMED, "`--schedule`"]
    return f"{SUMMARY}\n\n{markdown_table(heads, rows)}" if rows else NOTHING_YET


def situation(groups: Iterable[Group], key: tuple[str, str, str, str], words: str) -> list[list[str]]:
    """Return the row of the group with this schedule, model, data set and part, if it is there."""
    for group in groups:
        if tuple(group.cell[name] for name in ("schedule", "model", "dataset", "part")) == key and BASE in group.arms:
            return [summed(words, {arm: group.scores(arm) for arm in group.arms}, f"`{key[0]}` ({key[3]})")]
    return []


def summed(words: str, scores: Mapping[str, Scores], schedule: str) -> list[str]:
    """Return a row of the README, from the scores by arm and seed."""
    base = scores[BASE]
    shown = [next((arm for arm in arms if arm in scores), None) for arms in SUMMED.values()]
    found = [differences(scores[arm], base) if arm else [] for arm in shown]
    gains = [f"{with_error(paired)} ({len(paired)})" if paired else "" for paired in found]
    return [words, f"{100 * mean(base.values()):.1f}", *gains, schedule]


def page_part(groups: Sequence[Group]) -> str:
    if not groups:
        return NOTHING_YET
    plot = [f"![gain over vanilla against training time]({PLOT.name})"] if panels(groups) else []
    return "\n\n".join([LEGEND, *plot, *tables(groups), *diagnosis_tables(CELLS)])


def tables(groups: Sequence[Group]) -> list[str]:
    """Return the tables of accuracy, group by group, then those of robustness."""
    return [*map(section, groups), *robustness([group for group in groups if group.is_test])]


def section(group: Group) -> str:
    """Return all there is to say of one group."""
    fine_tuned = group.is_test and group.cell["schedule"].startswith("fine-tune")
    peers = [] if fine_tuned else [arms_table(group, PEERS, rivals=RIVALS), not_run(group)]
    tables = {
        "Peers": "\n\n".join(filter(None, peers)),
        "Fine-tuning": arms_table(group, FINE_TUNING) if fine_tuned else "",
        "The ladder": arms_table(group, LADDER),
        "Wrong labels": arms_table(group, WRONG_LABELS | WRONG_LABELS_EARLIER) if group.schedule["label_noise"] else "",
        "Variants, the best first": arms_table(group, {arm: f"`{arm}`" for arm in variants(group)}),
    }
    parts = [f"### {name}\n\n{table}" for name, table in tables.items() if table]
    judged_on = "test set" if group.is_test else "held-out part of the training set"
    return "\n\n".join([f"## {group.title}, {judged_on}", facts(group), *parts])


def variants(group: Group) -> list[str]:
    """Return all arms that are no peers, and what they are compared with, the best first; none if all have names."""
    tried = [arm for arm in group.arms if arm not in PEERS or arm in (BASE, "label-smoothing", OURS, FEATURES)]
    return sorted(tried, key=lambda arm: -mean(group.scores(arm).values())) if {*group.arms} - {*NAMES} else []


def facts(group: Group) -> str:
    """Return in two lines what was trained, on what, with which versions."""
    options = " ".join(f"--{name} {group.cell[name]}" for name in ("model", "dataset", "schedule", "part"))
    seeds = sorted({record["cell"]["seed"] for record in group.records})
    seen = [record["environment"] for record in group.records]
    devices = distinct(one["device"] for one in seen)
    versions = distinct(", ".join(f"{name} {number}" for name, number in one["versions"].items()) for one in seen)
    commits = distinct(one["commit"][:7] + "+" * one["commit"].endswith("+changes") for one in seen)
    speeds = [record["images_per_second"] for record in group.records if record["cell"]["arm"] == BASE]
    speed = f" A cell of vanilla trains on {median(speeds):.0f} images/s." if speeds else ""
    return (
        f"`{options}`: {in_words(group.schedule)}.\n"
        f"Seeds: {', '.join(map(str, seeds))}; {devices}; {versions}; commit {commits}.{speed}"
    )


def in_words(schedule: Record) -> str:
    per_class, size, noise = (schedule[name] for name in ("per_class", "image_size", "label_noise"))
    words = [
        f"{schedule['epochs']} epochs",
        "all labels" if per_class is None else f"{per_class} labelled images a class",
        f"{100 * noise:.0f} % of the labels wrong" if noise else "",
        f"{size} x {size} pixels",
        schedule["augmentation"],
        f"batch {schedule['batch_size']}",
        f"learning rate {schedule['lr']}",
        f"weight decay {schedule['weight_decay']}",
    ]
    return ", ".join(filter(None, words))


def named(arm: str) -> str:
    return NAMES.get(arm, f"`{arm}`")


def distinct(values: Iterable[str]) -> str:
    return " / ".join(sorted(set(values)))


def arms_table(group: Group, names: Mapping[str, str], rivals: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return one row for each named arm that has cells; nothing if there are none besides vanilla.

    The gains of the `rivals` over each arm are columns under the names they have there.
    """
    shown = [arm for arm in names if arm in group.arms]
    if not set(shown) - {BASE}:
        return ""
    heads = ["arm", "accuracy, %", "against vanilla", "top-5, %", "ECE, %", "time", "memory", "seeds"]
    rows = [[names[arm], *row(group, arm)] for arm in shown]
    for column, rival in enumerate((rival for rival in rivals if rival in group.arms), start=3):
        heads.insert(column, f"{rivals[rival]} against it")
        for arm, cells in zip(shown, rows, strict=True):
            cells.insert(column, gain(group.scores(rival), group.scores(arm)) if arm not in (BASE, rival) else "")
    return markdown_table(heads, rows)


def row(group: Group, arm: str) -> list[str]:
    accuracies = group.scores(arm)
    top5, ece = (group.scores(arm, result(name)).values() for name in ("top5", "ece"))
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
    """Return the mean paired difference in points ± its standard error, and its seeds if the reference lacks some."""
    paired = differences(scores, reference)
    partly = 0 < len(paired) < len(scores)
    return with_error(paired) + (f", {len(paired)} paired" if partly else "")


def in_percent(scores: Scores) -> str:
    return spread([100 * score for score in scores.values()])


def not_run(group: Group) -> str:
    """Name the peers without a cell; on the held-out part choices are made, and not all arms belong there."""
    missing = [named(arm) for arm in comparable(PEERS, group.schedule["image_size"]) if arm not in group.arms]
    return f"Not run: {', '.join(missing)}." if missing and group.is_test else ""


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
    columns = [
        (f"severity {severity}", {arm: judged.scores(arm, on_corrupted(severity, kinds)) for arm in judged.arms})
        for severity in SEVERITIES
    ]
    return f"### Corrupted images: {group.title}\n\nMean over {', '.join(kinds)}.\n\n{side_by_side(columns)}"


def side_by_side(columns: Sequence[tuple[str, Mapping[str, Scores]]]) -> str:
    """Return accuracies and gains by arm, one column for each of the named groups of scores."""
    there = dict.fromkeys(arm for _, scores in columns for arm in scores)
    rows = []
    for arm in sorted(there, key=lambda arm: (*PEERS, *NAMES, *there).index(arm)):
        cells = []
        for _, scores in columns:
            gained = gain(scores[arm], scores.get(BASE, {})) if arm in scores and arm != BASE else ""
            cells.append(in_percent(scores.get(arm, {})) + (f" ({gained})" if gained else ""))
        rows.append([named(arm), *cells])
    return markdown_table(["arm", *(name for name, _ in columns)], rows)


def points(group: Group) -> list[Point]:
    """Return what is plotted: every named arm whose cost is known, its time and its paired gains over vanilla."""
    gains = {arm: differences(group.scores(arm), group.scores(BASE)) for arm in group.costs if arm in NAMES}
    return [
        Point(named(arm).replace("**", ""), group.costs[arm]["time_ratio"], paired, ours=arm.startswith(OURS))
        for arm, paired in gains.items()
        if paired and arm != BASE
    ]


if __name__ == "__main__":
    main()
