"""Tables, goals and plot of `python -m benchmarks.transport`, from its JSON record."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.tables import markdown_table, page_with
from benchmarks.transport.peers import EMD2, ONE_THREAD, OURS, SIMPLEX

CASES = ("indep", "finetune", "degen", "identical")
MARK = "<!-- the tables below are made by `python -m benchmarks.transport` -->"
GAP_FLOOR = 1e-7  # gaps below are rounding: the plot draws them here

Row = dict[str, Any]


def goals(rows: list[Row], device: torch.device) -> list[str]:
    """Say of each goal whether it was reached, or by how much it was missed."""
    return list(cpu_goals(rows) if device.type == "cpu" else gpu_goals(rows))


def cpu_goals(rows: list[Row]) -> Iterable[str]:
    wanted = [("forward_seconds", SIMPLEX, 5.0, "forward"), ("both_seconds", EMD2, 15.0, "forward + backward")]
    for key, peer, goal, what in wanted:
        for case in CASES:
            for name in (OURS, ONE_THREAD):
                ours, theirs = find(rows, name, case, 64), find(rows, peer, case, 64)
                if ours.get(key) and theirs.get(key):
                    yield f"{name}, {what}, {case} 64: {times(theirs[key] / ours[key], goal)} of the {peer}"


def times(ratio: float, goal: float) -> str:
    verdict = "reached" if ratio >= goal else f"missed by a factor of {goal / ratio:.2f}"
    return f"{verdict} (goal {goal:.0f}x): {ratio:.1f}x the speed"


def gpu_goals(rows: list[Row]) -> Iterable[str]:
    """The limits hold for a batch of 256."""
    for label, limit, most in (("approximate", 60e-6, 1e-3), ("exact", 150e-6, 1e-6)):
        for case in CASES:
            own = [row for row in rows if row["solver"].startswith("sfr") and fits(row, case, 64)]
            good = [row for row in own if row.get("gap") is not None and row["gap"] <= most]
            if good:
                best = min(good, key=lambda row: row["forward_seconds"])
                seconds = best["forward_seconds"]
                verdict = "reached" if seconds <= limit else f"missed by a factor of {seconds / limit:.2f}"
                yield f"{label}, {case} 64: {verdict}: {seconds * 1e6:.0f} us, {best['solver']}, gap {best['gap']:.1e}"
            else:
                yield f"{label}, {case} 64: missed: no solver of ours has a gap of {most:.0e} or less"


def fits(row: Row, case: str, size: int, other: int | None = None, masses: str = "uniform") -> bool:
    return (row["case"], row["n"], row["m"], row["masses"]) == (case, size, other or size, masses)


def find(rows: list[Row], solver: str, case: str, *layout: Any) -> Row:
    """Return the row asked for, empty if it was not measured."""
    return next((row for row in rows if row["solver"] == solver and fits(row, case, *layout)), {})


def report(record: dict[str, Any]) -> str:
    """Return the tables and the goals as markdown."""
    rows = record["rows"]
    parts = [
        f"### N = M = {size}\n\n{table(rows, size)}" for size in sorted({r["n"] for r in rows if r["n"] == r["m"]})
    ]
    parts.append(f"### N = 64, M = 16\n\n{table(rows, 64, 16)}")
    parts.append(f"### N = 49, M = 64\n\n{table(rows, 49, 64)}")
    parts.append(f"### N = M = 64, cross-reference masses\n\n{table(rows, 64, 64, 'cross')}")
    parts.append(f"### Growth of the default solver, `indep`, ms\n\n{scaling_table(record['scaling'])}")
    parts.append("### Goals\n\n" + "\n".join(f"- {line}" for line in record["goals"] + record["notes"]))
    return "\n\n".join(parts)


def table(rows: list[Row], *layout: Any) -> str:
    """Return one line per solver: time and its ratio to our exact solver's, then quality."""
    cases = [case for case in CASES[:3] if any(fits(row, case, *layout) for row in rows)]
    names = list(dict.fromkeys(row["solver"] for row in rows))
    heads = [f"{case} {what}" for case in cases for what in ("ms", "fwd + bwd, ms", "gap")]
    heads += ["worst marginal error", "worst gradient cosine"]
    lines = []
    for name in names:
        found = [find(rows, name, case, *layout) for case in cases]
        if not any("forward_seconds" in row for row in found):
            continue
        ours = [find(rows, OURS, case, *layout).get("forward_seconds") for case in cases]
        cells = [cell for row, base in zip(found, ours, strict=True) for cell in figures_of(row, base)]
        errors = [row["marginal_error"] for row in found if row.get("marginal_error") is not None]
        cosines = [row["gradient_cosine"] for row in found if row.get("gradient_cosine") is not None]
        cells += [f"{max(errors):.0e}" if errors else "", f"{min(cosines):.4f}" if cosines else ""]
        lines.append([name, *cells])
    return markdown_table(["solver", *heads], lines)


def figures_of(row: Row, base: float | None) -> list[str]:
    if "forward_seconds" not in row:
        return ["skipped", "", ""]
    seconds, both, gap = row["forward_seconds"], row["both_seconds"], row["gap"]
    ratio = f" ({seconds / base:.2g}x)" if base else ""
    return [
        milliseconds(seconds) + ratio,
        milliseconds(both) if both else "",
        "none" if gap is None else "exact" if gap <= GAP_FLOOR else f"{gap:.1e}",
    ]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{2 if seconds < 0.01 else 1 if seconds < 0.1 else 0}f}"


def scaling_table(rows: list[Row]) -> str:
    sizes = sorted({row["n"] for row in rows})
    lines = []
    for batch, channels in dict.fromkeys((row["batch"], row["channels"]) for row in rows):
        own = [row for row in rows if (row["batch"], row["channels"]) == (batch, channels)]
        lines.append([str(batch), str(channels), *map(growth_cell, own)])
    note = "Forward from the cost / forward + backward from the nodes (share of the roofline reached)."
    return f"{markdown_table(['B', 'D', *(f'N = {size}' for size in sizes)], lines)}\n\n{note}"


def growth_cell(row: Row) -> str:
    forward, both = row["forward_seconds"], row["both_seconds"]
    rest = f" / {milliseconds(both)} ({row['least_seconds'] / both:.0%})" if both else ""
    return milliseconds(forward) + rest


def publish(record: dict[str, Any], page: Path) -> None:
    """Replace the tables of a page, which begin at the mark and go to its end."""
    page.write_text(page_with(page, report(record), MARK))


def draw(rows: list[Row], path: Path) -> None:
    """Draw time against gap at N = 64: the lower left is the frontier."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    shown = [row for row in rows if any(fits(row, case, 64) for case in CASES) and row.get("gap") is not None]
    names = list(dict.fromkeys(row["solver"] for row in shown))
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    markers = dict(zip(CASES, ("o", "s", "^", "D"), strict=True))
    exact = [name for name in names if any(row["solver"] == name and row["gap"] <= GAP_FLOOR for row in shown)]
    heights = {name: GAP_FLOOR * 2.0 ** -(k + 1) for k, name in enumerate(exact)}  # one line each, or they hide another
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    lowest = GAP_FLOOR * 2.0 ** -(len(exact) + 1)
    axes.axhspan(lowest, GAP_FLOOR, color="0.93", zorder=0)
    label = f"exact: gap of {GAP_FLOOR:.0e} or less (height without meaning)"
    axes.text(0.99, GAP_FLOOR * 1.3, label, transform=axes.get_yaxis_transform(), ha="right", color="0.35", fontsize=9)
    for row in shown:
        height = row["gap"] if row["gap"] > GAP_FLOOR else heights[row["solver"]]
        look: dict[str, Any] = {"color": colours[row["solver"]], "marker": markers[row["case"]], "edgecolor": "white"}
        axes.scatter(row["forward_seconds"] * 1e3, height, s=70, linewidth=0.6, alpha=0.9, zorder=3, **look)
    axes.set(xscale="log", yscale="log", xlabel=f"forward time of a batch of {shown[0]['batch']}, ms")
    axes.set(ylabel="gap to the optimum, relative", title="Transport solvers, N = M = 64, uniform masses")
    highest = max(row["gap"] for row in shown)
    axes.set_ylim(lowest, max(highest * 3, 1e-2))
    axes.set_yticks([10.0**k for k in range(-6, 1) if 10.0**k < highest * 3])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    solvers = [Line2D([], [], color=colours[n], marker="o", linestyle="", label=n) for n in names]
    hollow: dict[str, Any] = {"color": "black", "markerfacecolor": "none", "linestyle": ""}
    cases = [Line2D([], [], marker=markers[c], label=c, **hollow) for c in CASES]
    gap = Line2D([], [], linestyle="", label=" ")
    figure.legend(handles=[*solvers, gap, *cases], loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
