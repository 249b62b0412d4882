"""One cell of the KDEP benchmark: a student learns what a teacher says of unlabelled images, then a few labels."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.accuracy.methods.arm import divergence
from benchmarks.common.data import SOURCES
from benchmarks.common.environment import environment
from benchmarks.common.images import Batches, resized
from benchmarks.common.labels import few_labels
from examples.common.atomic_file import replace_file
from examples.common.data import Labelled
from examples.common.learning_rate import warmup_then_cosine
from examples.common.models import CifarResNet
from examples.common.pretrained import packaged_network
from examples.common.teachers import AsTrained
from sfr.pretrain import KDEPLoss, PooledFeatures
from sfr.pretrain.kdep import Aligner, alignment_of

SETTINGS: dict[str, Any] = {
    "teacher": "efficientnet-lite0",
    "teacher_size": 128,
    "student_depth": 8,
    "student_size": 16,
    "pretrain_dataset": "cifar100",
    "pretrain_images": 25_000,
    "pretrain_lr": 0.1,
    "batch_size": 128,
    "labels_per_class": {"cifar10": 50, "flowers": 20},
    "finetune_steps": 300,
    "finetune_batch_size": 50,
    "finetune_lr": 0.05,
    "weight_decay": 5e-4,
    "kd_temperature": 4.0,
}
POWERS = {"svd_pts": 3.0, "svd_pts2": 2.0}  # n of the power temperature scaling, by arm
ARMS = ("scratch", "labels", "logits", "conv1x1", "random", "channel_variance", "svd", *POWERS)
VIEWS = 2  # of each image: as it is, and mirrored
Transfer = Mapping[str, tuple[Labelled, Labelled]]


class Unlabelled(NamedTuple):
    """The images to pre-train on, and what the teacher says of both views of each.

    Args:
        images: as the student sees them; their labels are for the arm "labels" alone.
        features: of the teacher before its last activation, (2, N, D).
        logits: of the teacher, (2, N, classes of ImageNet).
    """

    images: Labelled
    features: Tensor
    logits: Tensor


Objective = Callable[[Tensor, int, Tensor], Tensor]  # images (B, 3, S, S), their view, their numbers (B,) -> loss


@torch.no_grad()
def unlabelled(images: Labelled, file: Path) -> Unlabelled:
    """Return images with the teacher's outputs, which are computed once and kept in a file, in half precision."""
    if not file.exists():
        teacher = PooledFeatures(seeing_as_trained(packaged_network(SETTINGS["teacher"])))
        teacher.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        last: dict[str, Tensor] = {}
        teacher.model.register_forward_hook(lambda _, __, output: last.update(logits=output))
        batches = batches_of(images.pixels, SETTINGS["pretrain_dataset"])
        features, logits = [], []
        for view in range(VIEWS):
            for part in torch.arange(len(images.labels)).split(100):
                features.append(teacher(seen(batches, view, part)).half())
                logits.append(last["logits"].half())
        shape = (VIEWS, len(images.labels), -1)
        outputs = {"features": torch.cat(features).view(shape), "logits": torch.cat(logits).view(shape)}
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda partial: torch.save(outputs, partial))
    outputs = torch.load(file, weights_only=True)
    small = Labelled(resized(images.pixels, SETTINGS["student_size"]), images.labels)
    return Unlabelled(small, outputs["features"].float(), outputs["logits"].float())


def seeing_as_trained(network: nn.Module) -> nn.Module:
    source = SOURCES[SETTINGS["pretrain_dataset"]]
    return AsTrained(network, source, (0.5,) * 3, (0.5,) * 3, SETTINGS["teacher_size"])


def run_cell(arm: str, steps: int, seed: int, given: Unlabelled, transfer: Transfer) -> dict[str, Any]:
    """Pre-train one student and fine-tune it on each data set; accuracies are those of all test images at the end."""
    start = time.process_time()
    torch.manual_seed(seed)
    student = CifarResNet(SETTINGS["student_depth"], 100).to(memory_format=torch.channels_last)
    losses = [] if arm == "scratch" else pretrain(student, arm, steps, seed, given)
    pretrained = time.process_time()
    found = {name: finetuned(copy.deepcopy(student), name, seed, *parts) for name, parts in transfer.items()}
    return {
        "arm": arm,
        "steps": 0 if arm == "scratch" else steps,
        "seed": seed,
        "accuracy": found,
        "pretrain_losses": losses,
        "pretrain_seconds": round(pretrained - start, 1),
        "seconds": round(time.process_time() - start, 1),
        "settings": SETTINGS,
        "environment": environment(torch.device("cpu")),
    }


def pretrain(student: CifarResNet, arm: str, steps: int, seed: int, given: Unlabelled) -> list[float]:
    """Train the student on what is known of the images; return the mean loss of each tenth of the steps."""
    extra, objective = objective_of(student, arm, seed, given)
    optimizer = sgd([*student.parameters(), *extra.parameters()], SETTINGS["pretrain_lr"])
    schedule = warmup_then_cosine(optimizer, steps)
    batches = batches_of(given.images.pixels, SETTINGS["pretrain_dataset"])
    order, losses = torch.Generator().manual_seed(seed), []
    student.train()
    numbers: list[Tensor] = []
    for _ in range(steps):
        if not numbers:
            whole = torch.randperm(len(given.images.labels), generator=order).split(SETTINGS["batch_size"])
            numbers = [part for part in whole if len(part) == SETTINGS["batch_size"]] or list(whole)
        part, view = numbers.pop(), int(torch.randint(VIEWS, (), generator=order))
        losses.append(step(objective(seen(batches, view, part), view, part), optimizer))
        schedule.step()
    tenth = max(1, steps // 10)
    return [round(sum(losses[i : i + tenth]) / tenth, 4) for i in range(0, steps - tenth + 1, tenth)]


def objective_of(student: CifarResNet, arm: str, seed: int, given: Unlabelled) -> tuple[nn.Module, Objective]:
    """Return the loss of an arm, and a module with the parameters that it needs besides the student's."""
    width = student.fc.in_features
    if arm == "labels":
        labels = given.images.labels
        return nn.Module(), lambda images, _, numbers: F.cross_entropy(student(images), labels[numbers])
    if arm == "logits":
        student.fc = nn.Linear(width, given.logits.shape[2])
        return nn.Module(), lambda images, view, numbers: softened(student(images), given.logits[view, numbers])
    aligner = cast(Aligner, "svd_pts" if arm in POWERS else arm)
    all_features = given.features.flatten(0, 1)
    alignment = alignment_of(all_features.split(5000), width)
    pooled, loss = PooledFeatures(student), KDEPLoss(alignment, aligner, power=POWERS.get(arm, 3.0), seed=seed)
    # Predicting the mean costs 1, whatever the scale of the target.
    loss.weight = 1 / loss.target(all_features).var(dim=0).mean().item()
    return loss, lambda images, view, numbers: loss(pooled(images), given.features[view, numbers])


def softened(logits: Tensor, teacher: Tensor) -> Tensor:
    """Knowledge distillation (Hinton et al., arXiv 1503.02531), without labels."""
    temperature = SETTINGS["kd_temperature"]
    return temperature**2 * divergence(logits, teacher, temperature)


def finetuned(student: CifarResNet, dataset: str, seed: int, train: Labelled, test: Labelled) -> float:
    """Train the whole student on a few labelled images of each class; return its accuracy on the test images."""
    torch.manual_seed(1000 + seed)  # the same new classifier and crops, whatever has been drawn before
    student.fc = nn.Linear(student.fc.in_features, SOURCES[dataset].num_classes)
    train, test = (Labelled(resized(part.pixels, SETTINGS["student_size"]), part.labels) for part in (train, test))
    draw = torch.Generator().manual_seed(seed)
    few = train.take(few_labels(train.labels, SETTINGS["labels_per_class"][dataset], draw))
    batches, size = Batches(few.pixels, dataset, "crop-flip", draw), SETTINGS["finetune_batch_size"]
    optimizer = sgd(list(student.parameters()), SETTINGS["finetune_lr"])
    schedule = warmup_then_cosine(optimizer, SETTINGS["finetune_steps"])
    student.train()
    for _ in range(SETTINGS["finetune_steps"]):
        numbers = torch.randperm(len(few.labels), generator=draw)[:size]
        step(F.cross_entropy(student(batches.augmented(numbers)), few.labels[numbers]), optimizer)
        schedule.step()
    return accuracy(student.eval(), dataset, test)


@torch.no_grad()
def accuracy(student: nn.Module, dataset: str, test: Labelled) -> float:
    batches = batches_of(test.pixels, dataset)
    parts = torch.arange(len(test.labels)).split(500)
    right = [(student(batches.plain(part)).argmax(dim=1) == test.labels[part]).sum() for part in parts]
    return (torch.stack(right).sum() / len(test.labels)).item()


def batches_of(pixels: Tensor, dataset: str) -> Batches:
    return Batches(pixels, dataset, "crop-flip", torch.Generator())


def seen(batches: Batches, view: int, numbers: Tensor) -> Tensor:
    """Return some images in one of the views, normalised, (B, 3, S, S)."""
    images = batches.plain(numbers)
    return images.flip(3) if view else images


def sgd(parameters: list[nn.Parameter], lr: float) -> SGD:
    return SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=SETTINGS["weight_decay"])


def step(loss: Tensor, optimizer: Optimizer) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
