"""Tables of the accuracy benchmark: of the cells that are there, paired by seed, never across groups."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import cost_plot, groups, report
from benchmarks.accuracy.methods import parse_arm
from benchmarks.common import tables
from sfr import SFRConfig

SCHEDULE = {
    "epochs": 60,
    "batch_size": 128,
    "lr": 0.1,
    "weight_decay": 5e-4,
    "image_size": 32,
    "per_class": 50,
    "label_noise": 0.0,
    "augmentation": "crop-flip",
}
ENVIRONMENT = {"device": "some CPU", "versions": {"torch": "2.0"}, "commit": "0123456789"}
COSTS = {
    "environment": ENVIRONMENT,
    "settings": {"model": "resnet20", "dataset": "cifar100", "repeats": 21},
    "schedule": SCHEDULE,
    "arms": {"sfr": {"time_ratio": 1.046, "memory_ratio": 1.1}},
}


def record(arm: str, seed: int, accuracy: float, corrupted: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A cell; `changes` are of what is trained, or of its schedule."""
    cell = {"part": "test", "schedule": "tenth", "model": "resnet20", "dataset": "cifar100"}
    return {
        "cell": cell | {"arm": arm, "seed": seed} | {name: changes[name] for name in cell.keys() & changes},
        "schedule": SCHEDULE | {name: changes[name] for name in SCHEDULE.keys() & changes},
        "environment": ENVIRONMENT,
        "images_per_second": 700,
        "result": {"accuracy": accuracy, "top5": 0.8, "ece": 0.05},
    } | ({"corrupted": {"severity": corrupted}} if corrupted else {})


def scored(arm: str, accuracies: dict[int, float], **changes: Any) -> list[Any]:
    return [record(arm, seed, accuracy, **changes) for seed, accuracy in accuracies.items()]


@pytest.fixture
def read(tmp_path: Path):
    """Return a function that writes cells and costs to files and reads them in groups."""

    def write_and_read(*records: Any, costs: dict[str, Any] | None = None) -> list[groups.Group]:
        (tmp_path / "cells").mkdir(exist_ok=True)
        for number, cell in enumerate(records):
            (tmp_path / "cells" / f"{number}.json").write_text(json.dumps(cell))
        if costs:
            (tmp_path / "costs-cpu.json").write_text(json.dumps({"key": costs}))
        return groups.read_groups(tmp_path)

    return write_and_read


def rows(text: str, arm: str) -> list[list[str]]:
    """All rows of an arm, by its display name, as cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [cells for cells in lines if cells[0] == arm]


def peers_of(found) -> str:
    """The facts, the table of the peers and what is missing in it, of each group that the plot shows."""
    shown = report.main_groups(found)
    parts = [(report.facts(group), report.arms_table(group, report.PEERS), report.not_run(group)) for group in shown]
    return "\n\n".join(part for group in parts for part in group)


def test_pages_are_those_of_the_committed_cells():
    for page, text in report.pages(report.read_groups(report.CELLS)).items():
        assert page.read_text() == text, f"{page.name} is out of date: python -m benchmarks.accuracy.report"


def test_plot_is_that_of_the_committed_cells():
    shown = report.panels(report.read_groups(report.CELLS))
    assert cost_plot.is_drawn(shown, report.PLOT), "the plot is out of date: python -m benchmarks.accuracy.report"


def test_committed_cells_of_sfr_are_named_by_what_differs_from_today_s_defaults():
    for file in report.CELLS.glob("*/*.json"):
        cell = json.loads(file.read_text())
        name, options = parse_arm(cell["cell"]["arm"])
        if name in ("sfr", "sfr-cutmix"):
            options.pop("probability", None)
            # What the length of the run and the number of its images decide.
            given = (
                ("alpha_steps", "num_samples") if cell["settings"].get("alpha_end") is not None else ("num_samples",)
            )
            options |= {key: cell["settings"][key] for key in given if key in cell["settings"]}
            settings = dict(cell["settings"])
            if "alpha_end" in options and "alpha_end" not in settings:
                options["alpha_steps"] = settings["alpha"]["steps"]
            assert settings.pop("stages", None) == options.pop("stages", None)
            if preset := options.pop("preset", None):
                few = preset == "few-labels"
                steps = settings["alpha"]["steps"] if few else 10 * settings["early_learning"]["steps"]
                expected = SFRConfig.preset(preset, steps=steps, **options)
            else:
                expected = SFRConfig.from_dict(options)
            assert SFRConfig.from_dict(settings) == expected, file.name


def test_row_holds_mean_deviation_and_paired_difference(read):
    [group] = read(*scored("vanilla", {0: 0.30, 1: 0.34}), *scored("sfr", {0: 0.33, 1: 0.35}))
    [row] = rows(peers_of([group]), "**sfr**")
    # deviation sqrt(2) / 2 * 2; differences 3 and 1: mean 2, standard error sqrt(2) / sqrt(2)
    assert row == ["**sfr**", "34.00 ± 1.41", "+2.00 ± 1.00", "80.0", "5.0", "", "", "2"]
    [base] = rows(peers_of([group]), "vanilla")
    assert base == ["vanilla", "32.00 ± 2.83", "", "80.0", "5.0", "", "", "2"]


def test_gains_of_sfr_over_each_peer_stand_beside_it_for_both_label_terms(read):
    scores = {"vanilla": 0.30, "ps-kd": 0.31, "sfr": 0.33, report.PAST: 0.36}
    [group] = read(*(record(arm, 0, score) for arm, score in scores.items()))
    peers = report.section(group).partition("### Peers")[2].partition("###")[0]
    [heads] = rows(peers, "arm")
    assert heads[3:5] == ["sfr against it", "the earlier default with past predictions against it"]
    assert rows(peers, "PS-KD")[0][3:5] == ["+2.00", "+5.00"]
    assert rows(peers, "**sfr**")[0][3:5] == ["", "+3.00"]
    assert rows(peers, "vanilla")[0][3:5] == ["", ""]


def test_difference_is_over_the_seeds_that_both_have(read):
    [group] = read(*scored("vanilla", {0: 0.30, 1: 0.34, 7: 0.1}), *scored("sfr", {0: 0.33, 1: 0.35, 5: 0.9}))
    [row] = rows(peers_of([group]), "**sfr**")
    assert row[2] == "+2.00 ± 1.00, 2 paired"
    assert row[-1] == "3"


def test_no_difference_without_a_common_seed(read):
    [group] = read(*scored("vanilla", {0: 0.30}), *scored("sfr", {1: 0.33}))
    assert rows(peers_of([group]), "**sfr**")[0][2] == ""


def test_one_seed_has_no_margin(read):
    [group] = read(*scored("vanilla", {0: 0.30}), *scored("sfr", {0: 0.32}))
    assert rows(peers_of([group]), "**sfr**")[0][1:3] == ["32.00", "+2.00"]


def test_standard_error_is_the_deviation_over_the_root_of_the_number(read):
    [group] = read(
        *scored("vanilla", dict.fromkeys(range(4), 0.3)), *scored("sfr", {0: 0.30, 1: 0.30, 2: 0.34, 3: 0.34})
    )
    # differences 0, 0, 4, 4: variance 16 / 3, so sqrt(16 / 3 / 4)
    assert rows(peers_of([group]), "**sfr**")[0][2] == "+2.00 ± 1.15"


def test_peers_are_held_against_sfr(read):
    cells = [*scored("vanilla", {0: 0.30}), *scored("cs-kd", {0: 0.31}), *scored("sfr", {0: 0.335})]
    text = report.page_part(read(*cells))
    assert rows(text, "CS-KD")[0][2:4] == ["+1.00", "+2.50"]


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "full-30"},
        {"model": "resnet18"},
        {"dataset": "cifar10"},
        {"part": "held-out"},
        {"epochs": 61},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_cells_of_another_kind_are_a_group_of_their_own(read, changes):
    found = read(*scored("vanilla", {0: 0.30}), *scored("sfr", {0: 0.40}, **changes))
    assert sorted(group.arms for group in found) == [["sfr"], ["vanilla"]]
    assert "+10.00" not in report.page_part(found)


def test_parts_do_not_show_in_each_other_s_tables(read):
    test = [*scored("vanilla", {0: 0.11}), *scored("sfr", {0: 0.12})]
    choices = {"vanilla": 0.21, "sfr": 0.22, "sfr@weight=3": 0.23}
    found = read(*test, *(record(arm, 0, score, part="held-out") for arm, score in choices.items()))
    assert [group.is_test for group in found] == [True, False]
    of_test, of_held_out = map(report.section, found)
    assert "11.00" in of_test
    assert "12.00" in of_test
    assert "21.00" in of_held_out
    assert "22.00" in of_held_out
    for text in (of_test, peers_of(found), *report.robustness([found[0]])):
        assert "21.00" not in text
        assert "22.00" not in text
    assert "11.00" not in of_held_out
    assert "12.00" not in of_held_out
    page = report.page_part(found)
    assert "21.00" not in page[page.index("## Robustness") :]


def test_every_arm_has_a_row_and_variants_are_sorted_with_what_they_are_compared_with(read):
    scores = {"vanilla": 0.30, "sfr": 0.33, "sfr@weight=0": 0.31, "sfr@pairs=last": 0.35, "ps-kd@alpha=0.5": 0.20}
    [group] = read(*(record(arm, 0, score, part="held-out") for arm, score in scores.items()))
    table = report.section(group).partition("### Variants")[2]
    shown = [line.split("|")[1].strip(" `") for line in table.splitlines() if line.startswith("| `")]
    assert shown == ["sfr@pairs=last", "sfr", "sfr@weight=0", "vanilla", "ps-kd@alpha=0.5"]


def test_peers_without_a_cell_are_named_and_have_no_row(read):
    cells = [record(arm, 0, 0.3) for arm in report.PEERS if arm not in ("byot", "ps-kd")]
    text = peers_of(read(*cells))
    assert "Not run: PS-KD, BYOT." in text
    assert not rows(text, "BYOT")
    assert "Not run" not in peers_of(read(*cells, record("byot", 0, 0.3), record("ps-kd", 0, 0.3)))


def test_the_plot_shows_the_tests_of_the_main_schedules_and_the_long_run_first(read):
    kinds = [
        ("full-30", "test"),
        ("tenth", "test"),
        ("full-200", "test"),
        ("noise20-16px", "test"),
        ("tenth", "held-out"),
    ]
    cells = [record(arm, 0, 0.3, schedule=name, part=part) for name, part in kinds for arm in ("vanilla", "sfr")]
    text = peers_of(read(*cells))
    assert re.findall("--schedule ([^ ]+) --part ([^`]+)`", text) == [kinds[2], kinds[1], kinds[0]]


def test_the_readme_has_a_row_for_each_situation_with_paired_gains_and_their_seeds(read):
    own = {"schedule": "tenth-16px"}
    cells = [
        *scored("vanilla", {0: 0.30, 1: 0.34}, **own),
        *scored("sfr", {0: 0.33, 1: 0.35}, **own),
        *scored(report.NOISY_LABELS, {1: 0.40}, **own),
        record("vanilla", 0, 0.5, schedule="no situation"),
        record("sfr", 0, 0.5, schedule="few-16px", part="held-out"),  # without vanilla there is no gain
    ]
    dense = {"lraspp": {"vanilla": {0: 0.35}, "sfr": {0: 0.36}}, "unet": {"sfr": {0: 0.4}}}
    lines = report.readme_part(read(*cells), dense).splitlines()
    words = report.SITUATIONS["tenth-16px", "resnet20", "cifar100", "test"]
    assert lines[-2] == f"| {words} | 32.0 | +2.00 ± 1.00 (2) | +6.00 (1) |  | `tenth-16px` (test) |"
    assert lines[-1] == f"| {report.DENSE['lraspp']} | 35.0 | +1.00 (1) |  |  | (test) |"
    assert sum(line.startswith("| ") for line in lines) == 4  # with the head
    assert report.readme_part([], {}) == report.NOTHING_YET


def test_fine_tuning_has_a_table_of_its_own_arms_and_misses_no_peer_that_does_not_belong_there(read):
    arms = ("vanilla", "l2-sp", "sfr-slow@decay=0.99,rising=False")
    cells = [record(arm, 0, 0.3 + 0.01 * i, schedule="fine-tune-20") for i, arm in enumerate(arms)]
    [text] = [report.section(group) for group in read(*cells)]
    assert "### Fine-tuning" in text
    assert "+1.00" in rows(text, "L2-SP")[0]
    assert "+2.00" in rows(text, "**sfr**, supervised by an average from the pretrained weights on")[0]
    assert "Not run" not in text


@pytest.mark.parametrize(("image_size", "factor"), [(32, 1.02), (16, 1.1)])
def test_vanilla_is_to_train_for_as_long_as_sfr_takes_on_images_of_that_size(read, image_size, factor):
    arms = [arm for arm in report.PEERS if not arm.startswith("vanilla-longer")]
    cells = [record(arm, 0, 0.3, image_size=image_size) for arm in arms]
    assert f"Not run: vanilla, {round(100 * factor - 100)} % longer." in peers_of(read(*cells))
    there = record(f"vanilla-longer@factor={factor}", 0, 0.3, image_size=image_size)
    assert "Not run" not in peers_of(read(*cells, there))


def test_costs_stand_beside_the_arms_they_were_measured_for(read):
    cells = [*scored("vanilla", {0: 0.3}), *scored("sfr", {0: 0.3})]
    [group] = read(*cells, costs=COSTS)
    text = peers_of([group])
    assert rows(text, "**sfr**")[0][-3:] == ["1.05x", "1.10x", "1"]
    assert rows(text, "vanilla")[0][-3:] == ["", "", "1"]


def test_of_two_measurements_of_an_arm_the_longer_counts(read):
    arms = {"sfr": {"time_ratio": 1.07, "memory_ratio": 1.1}}
    longer = COSTS | {"settings": COSTS["settings"] | {"repeats": 61}, "arms": arms}
    cell = record("sfr", 0, 0.3)
    for entries in ([COSTS, longer], [longer, COSTS]):
        assert groups.costs_of(cell, entries) == arms


@pytest.mark.parametrize(
    "other",
    [
        {"schedule": SCHEDULE | {"image_size": 16}},
        {"schedule": SCHEDULE | {"batch_size": 64}},
        {"settings": {"model": "resnet18", "dataset": "cifar100", "repeats": 21}},
        {"environment": ENVIRONMENT | {"device": "some GPU"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_costs_of_other_steps_are_left_out(read, other):
    [group] = read(record("sfr", 0, 0.3), costs=COSTS | other)
    assert group.costs == {}


def test_corruptions_are_averaged_over_those_that_all_cells_have(read):
    def on(fog: float, noise: float, **more: float) -> dict[str, dict[str, float]]:
        return {severity: {"fog": fog, "noise": noise, **more} for severity in report.SEVERITIES}

    cells = [
        record("vanilla", 0, 0.30, corrupted=on(0.20, 0.10, blur=0.9)),
        record("sfr", 0, 0.33, corrupted=on(0.22, 0.14)),
        record("sfr", 1, 0.99),
    ]
    [text] = [part for part in report.robustness(read(*cells)) if "Corrupted" in part]
    assert "Mean over fog, noise." in text
    assert rows(text, "**sfr**") == [["**sfr**", *["18.00 (+3.00)"] * 3]]
    assert rows(text, "vanilla") == [["vanilla", *["15.00"] * 3]]


def test_wrong_and_few_labels_stand_side_by_side(read):
    cells = [
        *scored("vanilla", {0: 0.30}),
        *scored("sfr", {0: 0.33}),
        *scored("vanilla", {0: 0.20}, schedule="noise", label_noise=0.2, per_class=None),
        *scored("sfr", {0: 0.24}, schedule="noise", label_noise=0.2, per_class=None),
        *scored("sfr", {0: 0.77}, schedule="full", per_class=None),
    ]
    [text] = [part for part in report.robustness(read(*cells)) if "wrong labels" in part]
    assert "| arm | noise | tenth |" in text
    assert rows(text, "**sfr**") == [["**sfr**", "24.00 (+4.00)", "33.00 (+3.00)"]]


def test_words_around_the_markers_stay(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert (
        tables.page_with(page, "new", report.BEGIN, report.END)
        == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    )


@pytest.mark.parametrize("text", ["", report.BEGIN, report.END + report.BEGIN])
def test_page_without_both_markers_is_refused(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md must have the lines"):
        tables.page_with(page, "new", report.BEGIN, report.END)


def test_check_names_the_page_that_is_out_of_date_and_writes_nothing(tmp_path, monkeypatch):
    stale, fresh = tmp_path / "stale.md", tmp_path / "fresh.md"
    text = f"{report.BEGIN}\nold\n{report.END}"
    stale.write_text(text)
    fresh.write_text(f"{report.BEGIN}\n\n{report.NOTHING_YET}\n\n{report.END}")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "README", fresh)
    monkeypatch.setattr(report, "PAGE", stale)
    monkeypatch.setattr(report, "CELLS", tmp_path / "none")
    monkeypatch.setattr(report, "DENSE", {})
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    with pytest.raises(SystemExit, match=r"out of date: stale\.md;"):
        report.main()
    assert stale.read_text() == text


def test_what_is_written_passes_the_check_which_draws_nothing(read, tmp_path, monkeypatch):
    own = {"schedule": "tenth-16px"}
    read(*scored("vanilla", {0: 0.3}, **own), *scored("sfr", {0: 0.31}, **own), costs=COSTS)
    paths = {"README": "README.md", "PAGE": "accuracy.md", "PLOT": "plot.png", "ROOT": "", "CELLS": ""}
    for name, path in paths.items():
        monkeypatch.setattr(report, name, tmp_path / path)
    for page in (report.README, report.PAGE):
        page.write_text(f"{report.BEGIN}{report.END}")
    monkeypatch.setattr("sys.argv", ["report.py"])
    report.main()
    assert "+1.00" in report.README.read_text()
    assert "(plot.png)" in report.PAGE.read_text()
    drawn = report.PLOT.stat().st_mtime_ns
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert ended.value.code == 0
    assert report.PLOT.stat().st_mtime_ns == drawn


@pytest.mark.parametrize("change", [lambda plot: plot.unlink(), lambda plot: report.draw({"other": []}, plot)])
def test_check_names_a_plot_that_is_missing_or_out_of_date(read, tmp_path, monkeypatch, change):
    read(*scored("vanilla", {0: 0.3}), *scored("sfr", {0: 0.31}), costs=COSTS)
    for name in ("README", "PAGE"):
        monkeypatch.setattr(report, name, tmp_path / f"{name}.md")
        (tmp_path / f"{name}.md").write_text(f"{report.BEGIN}{report.END}")
    monkeypatch.setattr(report, "PLOT", tmp_path / "plot.png")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "CELLS", tmp_path)
    monkeypatch.setattr("sys.argv", ["report.py"])
    report.main()
    change(report.PLOT)
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    with pytest.raises(SystemExit, match=r"out of date: plot\.png;"):
        report.main()


def test_plot_is_drawn_of_main_groups_with_costs(read, tmp_path, monkeypatch):
    times = {"sfr": {"time_ratio": 1.05}, "vanilla": {"time_ratio": 1.0}, "byot": {"time_ratio": 1.3}}
    costs = COSTS | {"arms": times}
    [group] = read(*scored("vanilla", {0: 0.3, 1: 0.3}), *scored("sfr", {0: 0.31, 1: 0.33}), costs=costs)
    [point] = report.points(group)
    assert (point.name, point.time, point.ours) == ("sfr", 1.05, True)
    assert point.gains == pytest.approx([1, 3])
    plots = [tmp_path / name for name in ("one.png", "two.png")]
    for plot in plots:
        report.draw({group.title: [point]}, plot)
    assert plots[0].read_bytes() == plots[1].read_bytes()


def test_names_in_the_plot_are_clear_of_each_other_and_at_their_points_where_there_is_room():
    gains = [1.0, -1.0, 0.99, 0.98, 0.4]
    places = cost_plot.heights(gains)
    clearance = cost_plot.NAME_HEIGHT * 2
    assert [places[1], places[4], places[3]] == [-1.0, 0.4, 0.98]
    assert places[2] == pytest.approx(0.98 + clearance)
    assert places[0] == pytest.approx(0.98 + 2 * clearance)
    assert cost_plot.heights([]) == []


def test_cells_trained_again_stand_beside_the_recorded_ones(tmp_path, monkeypatch, capsys):
    for folder, accuracies in {"recorded": (0.30, 0.31), "again": (0.32, 0.31, 0.5)}.items():
        (tmp_path / folder / "tenth-test").mkdir(parents=True)
        for seed, accuracy in enumerate(accuracies):
            cell = json.dumps(record("vanilla", seed, accuracy))
            (tmp_path / folder / "tenth-test" / f"vanilla-seed{seed}.json").write_text(cell)
    written = report.README.read_text()
    monkeypatch.setattr(report, "CELLS", tmp_path / "recorded")
    monkeypatch.setattr("sys.argv", ["report.py", "--results", str(tmp_path / "again")])
    report.main()
    printed = capsys.readouterr().out
    assert rows(printed, "tenth-test/vanilla-seed0") == [["tenth-test/vanilla-seed0", "30.00", "32.00", "+2.00"]]
    assert rows(printed, "tenth-test/vanilla-seed1") == [["tenth-test/vanilla-seed1", "31.00", "31.00", "+0.00"]]
    assert not rows(printed, "tenth-test/vanilla-seed2")
    assert rows(printed, "mean ± standard error") == [["mean ± standard error", "", "", "+1.00 ± 1.00"]]
    assert "## resnet20 on cifar100, schedule tenth, test set" in printed
    assert report.README.read_text() == written


def test_cells_of_which_none_is_recorded_are_said_to_be_new(read, tmp_path):
    [group] = read(*scored("vanilla", {0: 0.3}))
    assert group.is_test
    assert "None of these cells is recorded" in report.other_cells(tmp_path)


def test_folder_without_cells_says_what_makes_some(tmp_path):
    with pytest.raises(SystemExit, match="has no cells"):
        report.other_cells(tmp_path)
