"""The tables and the picture of docs/generative.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import mean

from matplotlib.figure import Figure

from benchmarks.common.cells import Record
from benchmarks.common.paired import spread, with_error
from benchmarks.common.paths import DOCS, RESULTS
from benchmarks.common.tables import markdown_table, page_with
from benchmarks.generative.cell import ARMS, PLANS, RATES, Plan
from examples.common.atomic_file import replace_file

CELLS = RESULTS / "generative"
PAGE = DOCS / "generative.md"
PICTURE = "generative-{}.png"  # of a plan
MARK = "<!-- the tables below are made by `python -m benchmarks.generative --report` -->"
MEASURES: dict[str, tuple[str, Callable[[Record], float]]] = {
    "error": ("error of the velocity x 1000", lambda scores: 1000 * scores["error"]),
    "frechet": ("Fréchet distance", lambda scores: scores["frechet"]["drawn"]),
    "best": ("best block's probe, %", lambda scores: 100 * max(scores["probes"])),
    "mean": ("mean of the blocks' probes, %", lambda scores: 100 * mean(scores["probes"])),
}

Cells = dict[str, dict[int, Record]]  # by arm and seed


def write_page() -> None:
    """Write the page's tables and pictures anew."""
    parts = [section(name, found) for name in PLANS if (found := read_cells(name))]
    PAGE.write_text(page_with(PAGE, "\n\n".join(parts) or "No cell has been run.", MARK))
    print(f"wrote {PAGE}")


def read_cells(plan: str) -> Cells:
    """Return the cells of a plan, the arms in their order."""
    found: Cells = {arm: {} for arm in ARMS}
    for file in sorted((CELLS / plan).glob("*.json")):
        cell = json.loads(file.read_text())
        found[cell["arm"]][cell["seed"]] = cell
    return {arm: cells for arm, cells in found.items() if cells}


def section(name: str, cells: Cells) -> str:
    """Return what is said of one plan."""
    plan = PLANS[name]
    figure = probe_picture(cells)
    replace_file(DOCS / PICTURE.format(name), lambda file: figure.savefig(file, format="png", dpi=120))
    return "\n\n".join(
        [
            f"## Plan `{name}`: {described(plan)}",
            facts(plan, cells),
            markdown_table(["arm", "seeds", *(head for head, _ in MEASURES.values())], rows(cells)),
            "Against plain training, paired by seed, mean ± standard error:",
            markdown_table(
                ["arm", "against", "seeds", *(head for head, _ in MEASURES.values())], difference_rows(cells)
            ),
            "The error by quarter of the time, from image to noise:",
            markdown_table(["arm", "first", "second", "third", "last"], quarter_rows(cells)),
            f"![Linear probes of all blocks]({PICTURE.format(name)})",
        ]
    )


def described(plan: Plan) -> str:
    tokens = (plan.image_size // plan.patch) ** 2
    return f"{plan.dataset}, {plan.image_size} x {plan.image_size} pixels, {tokens} tokens, {plan.depth} blocks"


def facts(plan: Plan, cells: Cells) -> str:
    some = next(iter(next(iter(cells.values())).values()))
    real = some["scores"]["frechet"]["training"]
    return (
        f"Width {plan.width}, {plan.epochs} epochs in batches of {plan.batch_size}, learning rate {plan.lr:g}. The "
        f"Fréchet distance is that of {plan.drawn:,} drawn images; of as many training images it is {real:.2f}."
    )


def values(cells: dict[int, Record], measure: str) -> dict[int, float]:
    """Return a measure of an arm by seed."""
    return {seed: MEASURES[measure][1](cell["scores"]) for seed, cell in cells.items()}


def rows(cells: Cells) -> list[list[str]]:
    return [
        [f"`{arm}`", str(len(own)), *(spread(list(values(own, measure).values())) for measure in MEASURES)]
        for arm, own in cells.items()
    ]


def difference_rows(cells: Cells) -> list[list[str]]:
    found = []
    for arm, own in cells.items():
        plain = cells.get(plain_of(arm), {})
        seeds = sorted(own.keys() & plain.keys())
        if arm != "vanilla" and seeds:
            entries = [with_error(differences(own, plain, seeds, measure)) for measure in MEASURES]
            found.append([f"`{arm}`", f"`{plain_of(arm)}`", str(len(seeds)), *entries])
    return found


def plain_of(arm: str) -> str:
    """Return the plain training that an arm is compared with, which has its learning rate."""
    faster = "vanilla-1.5-lr"
    return faster if arm != faster and RATES.get(arm) == RATES[faster] else "vanilla"


def differences(own: dict[int, Record], plain: dict[int, Record], seeds: Sequence[int], measure: str) -> list[float]:
    ours, theirs = values(own, measure), values(plain, measure)
    return [ours[seed] - theirs[seed] for seed in seeds]


def quarter_rows(cells: Cells) -> list[list[str]]:
    found = []
    for arm, own in cells.items():
        quarters = zip(*(cell["scores"]["error_by_quarter"] for cell in own.values()), strict=True)
        found.append([f"`{arm}`", *(f"{mean(quarter):.4f}" for quarter in quarters)])
    return found


def probe_picture(cells: Cells) -> Figure:
    """Draw the mean accuracy of the linear probes over the blocks."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for arm, own in cells.items():
        blocks = zip(*(cell["scores"]["probes"] for cell in own.values()), strict=True)
        accuracies = [100 * mean(block) for block in blocks]
        axes.plot(range(1, len(accuracies) + 1), accuracies, marker=".", label=arm)
    axes.set(xlabel="block", ylabel="linear probe, accuracy in %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
