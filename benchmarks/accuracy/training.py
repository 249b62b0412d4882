"""One cell of the accuracy benchmark: one arm, trained once with one seed and judged at its last epoch."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.accuracy.cell import Cell, Schedule
from benchmarks.accuracy.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from benchmarks.accuracy.methods import build_arm
from benchmarks.accuracy.methods.arm import Arm, Task
from benchmarks.common.data import SOURCES, Parts, load_parts
from benchmarks.common.environment import environment
from benchmarks.common.images import Batches, resized
from benchmarks.common.labels import few_labels, with_noise
from benchmarks.common.networks import build_network
from benchmarks.common.small_sets import SMALL_SOURCES
from examples.common.atomic_file import replace_file
from examples.common.data import Labelled
from examples.common.learning_rate import warmup_then_cosine
from examples.common.scores import classification_scores

SAVE_EVERY = 120  # seconds between two states that a killed cell goes on from
EVALUATION_BATCH = 500
CORRUPTED_IMAGES = 2500  # of the test set, for each of 24 corruptions


class CellRun:
    """Training of one cell.

    Runs with the same seed share initial weights, labelled images, wrong labels and the order of the images.
    """

    def __init__(self, cell: Cell, schedule: Schedule, parts: Parts, device: torch.device) -> None:
        self.cell, self.schedule, self.device = cell, schedule, device
        self.num_classes = SOURCES[cell.dataset].num_classes
        draw = torch.Generator().manual_seed(cell.seed)
        train = parts.train
        if schedule.per_class is not None:
            train = train.take(few_labels(train.labels, schedule.per_class, draw))
        labels = with_noise(train.labels, schedule.label_noise, self.num_classes, draw)
        self.train = Labelled(resized(train.pixels, schedule.image_size).to(device), labels.to(device))
        self.judged = Labelled(resized(parts.judged.pixels, schedule.image_size).to(device), parts.judged.labels)
        self.order, self.augmentation = (torch.Generator().manual_seed(10_000 * k + cell.seed) for k in (1, 2))
        self.batches = self._batches_of(self.train.pixels)

        torch.manual_seed(cell.seed)
        self.model = build_network(cell.model, self.num_classes).to(device).to(memory_format=torch.channels_last)
        epoch_steps = len(labels) // schedule.batch_size
        task = Task(
            self.model, self.batches.augmented, self.train.labels, self.num_classes, schedule.epochs, epoch_steps
        )
        self.arm: Arm = build_arm(cell.arm, task).to(device).to(memory_format=torch.channels_last)
        if device.type == "cuda":
            self.model.compile()  # now that the arm has hooked what it wants to see
        self.optimizer = optimizer_of(self.arm, schedule)
        self.epochs = round(schedule.epochs * self.arm.epochs_factor)
        self.learning_rate = warmup_then_cosine(self.optimizer, self.epochs * epoch_steps)
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0

    def step(self, indices: Tensor) -> Tensor:
        """Take one training step on the training images numbered `indices`; return the loss, 0-d."""
        with self.autocast():
            loss: Tensor = self.arm(indices)
        loss.backward()
        if self.schedule.optimizer == "adamw":
            nn.utils.clip_grad_norm_(self.arm.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.learning_rate.step()
        return loss.detach()

    def autocast(self) -> torch.autocast:
        """Return the context of a forward in the schedule's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.schedule.precision == "bf16")

    def train_epoch(self) -> None:
        """Go through the training images once, in whole batches."""
        start = time.perf_counter()
        self.arm.train()
        order = torch.randperm(len(self.train.labels), generator=self.order)
        size = self.schedule.batch_size
        steps = len(order) // size
        total = torch.stack([self.step(indices) for indices in order[: steps * size].split(size)]).sum().item()
        self.arm.end_epoch()
        self.seconds += time.perf_counter() - start
        self.curve.append({"epoch": len(self.curve) + 1, "loss": round(total / steps, 5)})

    def judge(self) -> dict[str, float]:
        """Return the scores on the judged images, and the accuracy on those trained on."""
        order = torch.randperm(len(self.train.labels), generator=torch.Generator().manual_seed(0))
        seen = order[: 10 * EVALUATION_BATCH]
        fitted = self.logits(self.batches, seen).argmax(dim=1) == self.train.labels[seen].cpu()
        images = self._batches_of(self.judged.pixels)
        scores = judged(self.logits(images, torch.arange(len(self.judged.labels))), self.judged.labels)
        return scores | {"train_accuracy": round(fitted.double().mean().item(), 5)}

    def judge_corrupted(self, images: Labelled) -> dict[str, dict[str, float]]:
        """Return the accuracy on corrupted images, by severity and corruption."""
        return {
            str(severity): {
                name: self._accuracy_on(corrupted(images.pixels, name, severity), images.labels) for name in CORRUPTIONS
            }
            for severity in SEVERITIES
        }

    def _accuracy_on(self, pixels: Tensor, labels: Tensor) -> float:
        images = self._batches_of(resized(pixels, self.schedule.image_size).to(self.device))
        logits = self.logits(images, torch.arange(len(labels)))
        return round((logits.argmax(dim=1) == labels).double().mean().item(), 5)

    @torch.no_grad()
    def logits(self, images: Batches, indices: Tensor) -> Tensor:
        """Return the logits (N, K), float32 on the CPU, of the images numbered `indices`, as they are."""
        self.arm.eval()
        with self.autocast():
            parts = [self.model(images.plain(part)).float().cpu() for part in indices.split(EVALUATION_BATCH)]
        return torch.cat(parts)

    def _batches_of(self, pixels: Tensor) -> Batches:
        return Batches(pixels, self.cell.dataset, self.schedule.augmentation, self.augmentation)

    def state(self) -> dict[str, Any]:
        """Return all that changes in training, to go on from after a kill."""
        return {
            "arm": self.arm.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "generators": [g.get_state() for g in (self.order, self.augmentation)] + [torch.get_rng_state()],
            "curve": self.curve,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state`."""
        self.arm.load_state_dict(state["arm"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.learning_rate.load_state_dict(state["learning_rate"])
        order, augmentation, everything_else = (generator.cpu() for generator in state["generators"])
        self.order.set_state(order)
        self.augmentation.set_state(augmentation)
        torch.set_rng_state(everything_else)
        self.curve, self.seconds = state["curve"], state["seconds"]


def run_cell(
    cell: Cell, schedule: Schedule, data_dir: Path | None, results: Path, cache: Path, device: torch.device
) -> None:
    """Train and judge one cell, and write its JSON; go on from where it was killed."""
    parts = load_parts(cell.dataset, data_dir, cache, cell.part)
    run = CellRun(cell, schedule, parts, device)
    file = results / cell.file
    state_file = file.with_suffix(".state")
    file.parent.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        run.restore(torch.load(state_file, map_location=device))
    saved = time.perf_counter()
    while len(run.curve) < run.epochs:
        run.train_epoch()
        if cell.part == "held-out" and len(run.curve) % 10 == 0:
            run.curve[-1]["accuracy"] = run.judge()["accuracy"]
        if time.perf_counter() - saved > SAVE_EVERY:
            replace_file(state_file, lambda path: torch.save(run.state(), path))
            saved = time.perf_counter()
    trained = run.epochs * (len(run.train.labels) // schedule.batch_size) * schedule.batch_size
    record = {
        "cell": asdict(cell),
        "schedule": asdict(schedule),
        "settings": run.arm.settings(),
        "environment": environment(device),
        "seconds": round(run.seconds, 1),
        "images_per_second": round(trained / run.seconds),
        "peak_bytes": peak_bytes(device),
        "result": run.judge(),
        "curve": run.curve,
    }
    if cell.part == "test" and cell.dataset not in SMALL_SOURCES:  # the strengths are those for CIFAR's images
        record["corrupted"] = {
            "severity": run.judge_corrupted(Labelled(*(values[:CORRUPTED_IMAGES] for values in parts.judged)))
        }
    replace_file(file, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    state_file.unlink(missing_ok=True)


def optimizer_of(arm: Arm, schedule: Schedule) -> Optimizer:
    if schedule.optimizer == "adamw":
        return AdamW(arm.parameters(), schedule.lr, weight_decay=schedule.weight_decay, fused=True)
    return SGD(
        arm.parameters(), schedule.lr, momentum=0.9, nesterov=True, weight_decay=schedule.weight_decay, fused=True
    )


def judged(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, top-5 accuracy, expected calibration error and cross-entropy of logits (N, K)."""
    scores = classification_scores(logits.double().numpy(), labels.numpy())
    return {name: round(value, 5) for name, value in scores.items()}


def peak_bytes(device: torch.device) -> int:
    """Return the most memory held so far: by tensors on the device, on a CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
