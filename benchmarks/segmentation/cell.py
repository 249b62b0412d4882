"""One training of a network that gives every pixel a class, and how it is judged."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sfr
from benchmarks.accuracy.methods import parse_arm
from benchmarks.common.cells import Record, write_record
from benchmarks.common.environment import environment
from benchmarks.segmentation.data import NUM_CLASSES, VOID, Scenes, augmented, load_scenes, normalised
from benchmarks.segmentation.networks import build_network
from examples.common.learning_rate import warmup_then_cosine
from sfr.model.outputs import the_logits


@dataclass(frozen=True)
class Plan:
    """The recipe of all arms: SGD with momentum 0.9, warm-up and cosine."""

    epochs: int = 40
    batch_size: int = 8
    lr: float = 0.05
    weight_decay: float = 5e-4
    limit: int | None = None
    precision: str = "bf16"


PLANS = {"tiny": Plan(epochs=1, batch_size=2, limit=4), "cpu": Plan()}


@dataclass(frozen=True)
class Cell:
    """What is trained: an arm ("vanilla", "sfr" or "sfr@switch=value,...") of a network, from one seed."""

    plan: str
    model: str
    arm: str
    seed: int
    part: str = "test"  # or "validation", for every choice that is made

    @property
    def file(self) -> Path:
        """Where the result lies, below the folder of all results."""
        return Path(f"{self.plan}-{self.part}", f"{self.model}-{self.arm}-seed{self.seed}.json")


def run_cell(cell: Cell, data_dir: Path, results: Path, cache: Path) -> Record:
    """Train and judge one cell and write its file.

    Cells of one seed share initial weights, the order of the images and their windows.

    Args:
        cell: which one.
        data_dir: folder with CamVid's Parquet files.
        results: folder of the JSON files.
        cache: folder of the decoded images.
    """
    plan = PLANS[cell.plan]
    train, judged = (load_scenes(data_dir, cache, part).take(slice(plan.limit)) for part in ("train", cell.part))
    torch.manual_seed(cell.seed)
    network = build_network(cell.model, NUM_CLASSES).to(memory_format=torch.channels_last)
    start = time.perf_counter()
    curve = trained(network, cell, plan, train)
    record = {
        **asdict(cell),
        "recipe": asdict(plan),
        "environment": environment(torch.device("cpu")),
        "seconds": round(time.perf_counter() - start, 1),
        "result": scores(network, judged, plan) | {"train_miou": scores(network, train, plan)["miou"]},
        "curve": curve,
    }
    write_record(results / cell.file, record)
    return record


def trained(network: nn.Module, cell: Cell, plan: Plan, scenes: Scenes) -> list[float]:
    """Train a network and return the loss of each epoch; a wrapped one is unwrapped at the end."""
    name, switches = parse_arm(cell.arm)
    criterion: nn.Module = nn.CrossEntropyLoss(ignore_index=VOID)
    if name == "sfr":
        criterion = sfr.SFRLoss(sfr.SFRWrapper(network), ignore_index=VOID, **switches)
    elif name != "vanilla" or switches:
        raise ValueError(f"arm must be 'vanilla', 'sfr' or 'sfr@switch=value,...'; got {cell.arm!r}")
    optimizer = torch.optim.SGD(
        network.parameters(), plan.lr, momentum=0.9, nesterov=True, weight_decay=plan.weight_decay
    )
    steps = len(scenes.pixels) // plan.batch_size
    rate = warmup_then_cosine(optimizer, plan.epochs * steps)
    order, draw = (torch.Generator().manual_seed(10_000 * k + cell.seed) for k in (1, 2))
    curve = []
    for _ in range(plan.epochs):
        network.train()
        total = 0.0
        for indices in torch.randperm(len(scenes.pixels), generator=order)[: steps * plan.batch_size].view(steps, -1):
            batch = augmented(scenes.take(indices), draw)
            with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16"):
                output = network(normalised(batch.pixels))
                loss = criterion(output if name == "sfr" else the_logits(output), batch.classes.long())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            total += loss.item()
        curve.append(round(total / steps, 5))
    if name == "sfr":
        sfr.unwrap(network)
    return curve


@torch.no_grad()
def scores(network: nn.Module, scenes: Scenes, plan: Plan) -> dict[str, Any]:
    """Return the mean over the classes of intersection over union, that of each class, and the pixels' accuracy."""
    network.eval()
    counts = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.long)
    for pixels, classes in zip(scenes.pixels.split(16), scenes.classes.split(16), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16"):
            counts += confusion(the_logits(network(normalised(pixels))).argmax(dim=1), classes.long())
    right = counts.diagonal()
    union = counts.sum(dim=0) + counts.sum(dim=1) - right
    present = union > 0
    own = right / union.clamp_min(1)
    return {
        "miou": round(own[present].mean().item(), 5),
        "iou": [round(value, 5) for value in own.tolist()],
        "pixel_accuracy": round((right.sum() / counts.sum()).item(), 5),
    }


def confusion(found: Tensor, classes: Tensor) -> Tensor:
    """Return how many pixels of each class (row) were taken for each (column), (K, K), of those that have a class."""
    known = classes != VOID
    pairs = classes[known] * NUM_CLASSES + found[known]
    return pairs.bincount(minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)
