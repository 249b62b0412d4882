"""One training of a diffusion transformer by examples/train_flow.py, and how it is judged."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.cells import Record, write_record
from benchmarks.common.data import SOURCES, load_parts
from benchmarks.common.environment import environment
from benchmarks.common.example import command_of, history_of, run_example
from benchmarks.common.images import resized
from benchmarks.common.paths import ROOT
from benchmarks.generative.scores import frechet_distances, probes
from examples.common.data import Labelled
from examples.common.diffusion_transformer import DiffusionTransformer
from examples.common.flow import sample

ARMS = {
    "vanilla": "--method vanilla",
    "vanilla-1.5-lr": "--method vanilla",
    "layersync": "",  # what the example does: in place, cosine, the blocks at 0.3 and 0.7 of the depth, weight 0.5
    "layersync-1.5-lr": "",
    "layersync-0.2": "--sfr feature_weight=0.2",
    "transport": "--sfr matching=transport",
    "in-place-all": "--sfr pairs=all",
    "slow-supervisor": "--average-supervises",
}
RATES = {"vanilla-1.5-lr": 1.5, "layersync-1.5-lr": 1.5}  # learning rates as multiples of the plan's


@dataclass(frozen=True)
class Plan:
    """The recipe of all arms, and how many images they are judged on."""

    dataset: str
    image_size: int
    patch: int
    width: int
    depth: int
    epochs: int
    batch_size: int = 128
    lr: float = 1e-3
    limit: int | None = None
    drawn: int = 5000  # images for the Fréchet distance
    sampling_steps: int = 8  # of Heun's method
    probed: int = 10_000  # training images for the linear probes

    def options(self, arm: str, seed: int) -> list[str]:
        """Return the command line of the example."""
        values = {name.replace("_", "-"): getattr(self, name) for name in RECIPE} | {"seed": seed}
        values["lr"] = self.lr * RATES.get(arm, 1)
        given = [f"--{name}={value}" for name, value in values.items() if value is not None]
        return given + ARMS[arm].split()


RECIPE = ("dataset", "image_size", "patch", "width", "depth", "epochs", "batch_size", "lr", "limit")
PLANS = {
    "tiny": Plan(
        "digits", 8, 4, 16, 4, 1, batch_size=16, limit=64, drawn=32, sampling_steps=1, probed=64
    ),  # tries every line
    "digits": Plan("digits", 8, 2, 48, 6, 60, batch_size=64, lr=2e-3, drawn=1000, sampling_steps=12),
    "cpu": Plan("cifar10", 16, 4, 96, 8, 6),
    "gpu": Plan("cifar100", 32, 2, 384, 12, 60, batch_size=256, drawn=10_000, sampling_steps=20),
}


@dataclass(frozen=True)
class Cell:
    """What is trained: an arm of a plan, from one seed."""

    plan: str
    arm: str
    seed: int

    @property
    def file(self) -> Path:
        """Where the result lies, below the folder of all results."""
        return Path(self.plan, f"{self.arm}-seed{self.seed}.json")


def run_cell(cell: Cell, data_dir: Path | None, results: Path, cache: Path) -> Record:
    """Train and judge one cell and write its file; a training that was killed goes on.

    Args:
        cell: which one.
        data_dir: folder with the data set's Parquet files, in place of the Hub.
        results: folder of the JSON files.
        cache: folder of the trainings, and of the decoded images.
    """
    plan = PLANS[cell.plan]
    folder = (cache / cell.file).with_suffix("")
    options = plan.options(cell.arm, cell.seed)
    train(options, data_dir, folder)
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = judged(plan, folder, data_dir, cache, device)
    history = history_of(folder)
    record = {
        **asdict(cell),
        "options": " ".join(options),
        "environment": environment(device),
        "training_seconds": round(sum(epoch["seconds"] for epoch in history), 1),
        "judging_seconds": round(time.perf_counter() - start, 1),
        "scores": found,
        "history": history,
    }
    write_record(results / cell.file, record)
    return record


def train(options: list[str], data_dir: Path | None, folder: Path) -> None:
    """Run the example, or what is left of it."""
    command = command_of("train_flow.py", [*options, "--output-dir", str(folder.resolve()), "--resume"], data_dir)
    if not (folder / "model.pt").exists():
        run_example(command, {"PYTHONPATH": str(ROOT)})


def judged(plan: Plan, folder: Path, data_dir: Path | None, cache: Path, device: torch.device) -> Record:
    """Return the scores of the slow average of a training."""
    classes = SOURCES[plan.dataset].num_classes
    network = DiffusionTransformer(
        plan.image_size, patch=plan.patch, width=plan.width, depth=plan.depth, heads=4, num_classes=classes
    )
    network.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    network.to(device).eval()
    parts = load_parts(plan.dataset, data_dir, cache, "test")
    train, test = (in_range(Labelled(*(each[: plan.limit] for each in part)), plan.image_size) for part in parts)
    summary = json.loads((folder / "summary.json").read_text())
    images = {"drawn": drawn_images(network, plan, classes, device), "training": train.pixels[: plan.drawn]}
    return {
        "error": summary["test_loss"],
        "error_by_quarter": [summary[f"test_loss_quarter_{i}"] for i in (1, 2, 3, 4)],
        "frechet": frechet_distances(test.pixels, images, device),
        "probes": probes(network, Labelled(*(part[: plan.probed] for part in train)), test, classes),
    }


def in_range(part: Labelled, size: int) -> Labelled:
    """Return images of a size in [-1, 1], with their labels."""
    return Labelled(resized(part.pixels, size) / 127.5 - 1, part.labels)


def drawn_images(network: DiffusionTransformer, plan: Plan, classes: int, device: torch.device) -> Tensor:
    """Return images that the network has drawn, in equal parts of each class, from the same noise for every arm."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(plan.drawn) % classes
    noise = torch.randn(plan.drawn, 3, plan.image_size, plan.image_size, generator=generator)
    parts = zip(noise.split(plan.batch_size), labels.split(plan.batch_size), strict=True)
    return torch.cat([sample(network, a.to(device), b.to(device), plan.sampling_steps).cpu() for a, b in parts])
