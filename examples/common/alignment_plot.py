"""A picture of an alignment: what is left out of the teacher's features, and how unequal the student's targets are."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from sfr.pretrain import Alignment, power_temperature_scaling


def plot_alignment(
    alignment: Alignment, projected: Tensor, scalings: Sequence[tuple[float, float]], file: Path
) -> None:
    """Draw singular values on the left; on the right each channel's spread before and after power temperature scaling.

    Args:
        alignment: of the teacher's features.
        projected: some features after it, (N, dim).
        scalings: temperature and power of each scaling.
        file: where the picture goes.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    values, spreads = figure.subplots(1, 2)
    values.semilogy(alignment.singular_values.cpu())
    values.axvline(alignment.dim - 0.5, color="grey", linestyle="--", label=f"the student's {alignment.dim} channels")
    values.set(xlabel="component", ylabel="singular value")
    targets = {"before scaling": projected}
    for temperature, power in scalings:
        targets[f"after scaling, n = {power:g}"] = power_temperature_scaling(projected, temperature, power)
    for name, features in targets.items():
        deviation = features.std(dim=0).cpu()
        ratio = deviation.max() / deviation.min().clamp_min(1e-12)
        spreads.semilogy(deviation / deviation.max(), label=f"{name}: largest / smallest = {ratio:.3g}")
    spreads.set(xlabel="channel", ylabel="standard deviation / the largest")
    for axes in (values, spreads):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)
