"""KDEP on real CIFAR: what a student learns from a teacher's features on unlabelled images, aligner by aligner.

    python -m benchmarks.pretrain.kdep --data-dir DIR      # DIR holds the Parquet files of CIFAR-10 and CIFAR-100
    python -m benchmarks.pretrain.kdep --report            # writes docs/kdep.md from the results

A WRN-16-2 (128 features) is trained on CIFAR-100. ResNet-8 students (64 features) are pre-trained on the images of
CIFAR-100 without labels, each arm with the same steps, and then fine-tuned on a few labelled images of CIFAR-10.
Within a seed all arms share initial weights, order of the images and labelled images. Every cell (arm, seed) is one
JSON; a cell that has one is not run again, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from benchmarks.common.environment import environment
from benchmarks.common.example import command_of, run_example
from benchmarks.common.labels import few_labels
from benchmarks.common.paired import differences, spread
from benchmarks.common.paths import DOCS, RESULTS, ROOT
from benchmarks.common.tables import markdown_table, page_with
from examples.common.data import SOURCES, ImageSet, Labelled, load_cifar
from examples.common.learning_rate import warmup_then_cosine
from examples.common.models import CifarResNet, build_model
from sfr.pretrain import KDEPLoss, PooledFeatures
from sfr.pretrain.kdep import Aligner, Alignment, alignment_of

CELLS = RESULTS / "kdep"
PAGE = DOCS / "kdep.md"
ARMS = ("scratch", "logits", "conv1x1", "random", "channel_variance", "svd", "svd_pts")
SETTINGS: dict[str, Any] = {
    "teacher": "wrn_16_2",
    "teacher_epochs": 4,
    "student_depth": 8,
    "pretrain_images": 25_000,
    "pretrain_epochs": 2,
    "pretrain_lr": 0.1,
    "labels_per_class": 50,
    "finetune_epochs": 30,
    "finetune_lr": 0.05,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "finetune_batch_size": 50,
    "kd_temperature": 4.0,
    "precision": "bf16",
}
CLAIMS = [  # the order that the paper's numbers suggest
    ("svd_pts", "svd"),
    ("svd_pts", "channel_variance"),
    ("svd", "conv1x1"),
    ("channel_variance", "conv1x1"),
    ("conv1x1", "logits"),
    ("logits", "scratch"),
]
MARKER = "<!-- the tables below are made by `python -m benchmarks.pretrain.kdep` -->"
ON_THE_CPU = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_MIXED_PRECISION": SETTINGS["precision"],
    "OMP_NUM_THREADS": "1",
}
Objective = Callable[[Tensor, Tensor], Tensor]  # images of a batch, their indices -> loss


def main() -> None:
    """Run every cell that has no result yet, then write the page."""
    args = parse_arguments()
    if not args.report:
        torch.set_num_threads(1)
        run_cells(args)
    PAGE.write_text(page(load_results()))
    print(f"wrote {PAGE}")


def run_cells(args: argparse.Namespace) -> None:
    cells = [(arm, seed) for seed in args.seeds for arm in args.arms if not result_file(arm, seed).exists()]
    if not cells:
        return
    CELLS.mkdir(parents=True, exist_ok=True)
    unlabelled, _ = load_cifar("cifar100", args.data_dir, SETTINGS["pretrain_images"])
    cache = teacher_outputs(args, unlabelled)
    transfer = load_cifar("cifar10", args.data_dir, None)
    for arm, seed in cells:
        record = run_cell(arm, seed, unlabelled, cache, transfer)
        result_file(arm, seed).write_text(json.dumps(record, indent=1) + "\n")
        print(f"{arm:17} seed {seed}  accuracy {record['accuracy']:.4f}  {record['seconds']:.0f} s", flush=True)


def result_file(arm: str, seed: int) -> Path:
    return CELLS / f"{arm}-seed{seed}.json"


def teacher_outputs(args: argparse.Namespace, images: Labelled) -> dict[str, Tensor]:
    """Return the trained teacher's features and logits of all images, not augmented; computed once and kept."""
    file = args.work_dir / "teacher-outputs.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    teacher = trained_teacher(args)
    teacher.requires_grad_(False).eval()
    pooled = PooledFeatures(teacher)
    last: dict[str, Tensor] = {}
    teacher.register_forward_hook(lambda _, __, output: last.update(logits=output.float()))
    outputs = evaluated(lambda batch: torch.cat([pooled(batch), last["logits"]], dim=1), images, "cifar100")
    features, logits = outputs[:, :-100].contiguous(), outputs[:, -100:].contiguous()
    torch.save({"features": features, "logits": logits}, file)
    return {"features": features, "logits": logits}


def trained_teacher(args: argparse.Namespace) -> nn.Module:
    """Train the teacher with the example's own command, or load what it has left."""
    folder = args.work_dir / "teacher"
    if not (folder / "summary.json").exists():
        run_example(teacher_command(args, folder), ON_THE_CPU)
    summary = json.loads((folder / "summary.json").read_text())
    record = {
        "accuracy": summary["test_accuracy"],
        "settings": SETTINGS,
        "environment": environment(torch.device("cpu")),
    }
    (CELLS / "teacher.json").write_text(json.dumps(record, indent=1) + "\n")
    teacher = build_model(SETTINGS["teacher"], 100)
    teacher.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return teacher.to(memory_format=torch.channels_last)


def teacher_command(args: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command that trains the teacher, from the root; it goes on where it was stopped."""
    recipe = ["--model", SETTINGS["teacher"], "--epochs", str(SETTINGS["teacher_epochs"]), "--method", "vanilla"]
    where = ["--output-dir", str(folder.resolve()), "--resume"]
    return command_of("train_cifar.py", ["--dataset", "cifar100", *recipe, *where], args.data_dir)


def run_cell(
    arm: str, seed: int, unlabelled: Labelled, cache: dict[str, Tensor], transfer: tuple[Labelled, Labelled]
) -> dict[str, Any]:
    """Pre-train and fine-tune one student; the result is that of the last epoch on the whole test set."""
    start = time.process_time()
    torch.manual_seed(seed)
    student = CifarResNet(SETTINGS["student_depth"], 100).to(memory_format=torch.channels_last)
    losses = [] if arm == "scratch" else pretrain(student, arm, seed, unlabelled, cache)
    torch.manual_seed(1000 + seed)  # the same new classifier, labels and crops, whatever has been drawn before
    student.fc = nn.Linear(student.fc.in_features, 10)
    train, test = transfer
    labelled = few_labels(train.labels, SETTINGS["labels_per_class"], torch.Generator().manual_seed(seed))
    finetune(student, train.take(labelled))
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": accuracy(student, test),
        "pretrain_losses": losses,
        "seconds": time.process_time() - start,
        "settings": SETTINGS,
        "environment": environment(torch.device("cpu")),
    }


def pretrain(student: CifarResNet, arm: str, seed: int, images: Labelled, cache: dict[str, Tensor]) -> list[float]:
    """Train the student on what the teacher says of the images; return the mean loss of each epoch."""
    extra: nn.Module = nn.Module()
    objective: Objective
    if arm == "logits":
        objective = logits_objective(student, cache["logits"])
    else:
        extra, objective = feature_objective(student, cast(Aligner, arm), seed, cache["features"])
    steps_per_epoch = len(images.labels) // SETTINGS["batch_size"]
    optimizer = sgd([*student.parameters(), *extra.parameters()], SETTINGS["pretrain_lr"])
    schedule = warmup_then_cosine(optimizer, steps_per_epoch * SETTINGS["pretrain_epochs"])
    order = torch.Generator().manual_seed(seed)
    source = ImageSet(images, SOURCES["cifar100"], augment=False)
    losses = []
    student.train()
    for _ in range(SETTINGS["pretrain_epochs"]):
        total = 0.0
        for indices in torch.randperm(len(source), generator=order).split(SETTINGS["batch_size"])[:steps_per_epoch]:
            total += step(objective(normalised(source, indices), indices), optimizer)
            schedule.step()
        losses.append(total / steps_per_epoch)
    return losses


def logits_objective(student: CifarResNet, logits: Tensor) -> Objective:
    """Knowledge distillation by softened logits (Hinton et al., arXiv 1503.02531), without labels."""
    temperature = SETTINGS["kd_temperature"]

    def objective(images: Tensor, indices: Tensor) -> Tensor:
        with autocast():
            own = student(images)
        return temperature**2 * F.kl_div(
            F.log_softmax(own.float() / temperature, dim=1),
            F.log_softmax(logits[indices] / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )

    return objective


def feature_objective(student: CifarResNet, arm: Aligner, seed: int, features: Tensor) -> tuple[nn.Module, Objective]:
    """KDEP with one aligner, weighted so that predicting the mean costs 1 whatever the scale of the target."""
    pooled = PooledFeatures(student)
    loss = KDEPLoss(student_alignment(student, features), arm, seed=seed)
    loss.weight = 1 / loss.target(features).var(dim=0).mean().item()

    def objective(images: Tensor, indices: Tensor) -> Tensor:
        with autocast():
            own = pooled(images)
        return loss(own, features[indices])

    return loss, objective


def student_alignment(student: CifarResNet, features: Tensor) -> Alignment:
    return alignment_of([features], student.fc.in_features)


def finetune(student: CifarResNet, labelled: Labelled) -> None:
    """Train the whole student with cross-entropy on the labelled images."""
    images = ImageSet(labelled, SOURCES["cifar10"], augment=True)
    loader = DataLoader(images, SETTINGS["finetune_batch_size"], shuffle=True, collate_fn=images.collate)
    optimizer = sgd(list(student.parameters()), SETTINGS["finetune_lr"])
    schedule = warmup_then_cosine(optimizer, len(loader) * SETTINGS["finetune_epochs"])
    student.train()
    for _ in range(SETTINGS["finetune_epochs"]):
        for batch, labels in loader:
            with autocast():
                logits = student(batch)
            step(F.cross_entropy(logits.float(), labels), optimizer)
            schedule.step()


def accuracy(student: CifarResNet, test: Labelled) -> float:
    student.eval()
    predicted = evaluated(student, test, "cifar10").argmax(dim=1)
    return (predicted == test.labels).float().mean().item()


@torch.no_grad()
def evaluated(function: Callable[[Tensor], Tensor], images: Labelled, source: str) -> Tensor:
    """Return what a function says of all images, in their order and not augmented."""
    data = ImageSet(images, SOURCES[source], augment=False)
    with autocast():
        return torch.cat([function(normalised(data, indices)) for indices in torch.arange(len(data)).split(500)])


def normalised(data: ImageSet, indices: Tensor) -> Tensor:
    return data.normalise(data.data.pixels[indices]).contiguous(memory_format=torch.channels_last)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=SETTINGS["precision"] == "bf16")


def sgd(parameters: list[nn.Parameter], lr: float) -> SGD:
    return SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=SETTINGS["weight_decay"])


def step(loss: Tensor, optimizer: Optimizer) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def load_results() -> dict[str, dict[int, float]]:
    """Return the accuracy of every finished cell, by arm and seed."""
    found: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    for file in sorted(CELLS.glob("*-seed*.json")):
        record = json.loads(file.read_text())
        found[record["arm"]][record["seed"]] = record["accuracy"]
    return {arm: cells for arm, cells in found.items() if cells}


def page(results: dict[str, dict[int, float]]) -> str:
    """Return the page: the words that stand in it, and below the marker both tables anew."""
    teacher = json.loads((CELLS / "teacher.json").read_text())["accuracy"]
    reached = [
        [
            arm,
            spread([100 * value for value in cells.values()]),
            str(len(cells)),
            difference(cells, results.get("scratch", {})),
        ]
        for arm, cells in results.items()
    ]
    claimed = []
    for better, worse in CLAIMS:
        if better in results and worse in results:
            paired = differences(results[better], results[worse])
            agree = sum(value > 0 for value in paired)
            claimed.append([f"{better} > {worse}", spread(paired, sign="+"), f"{agree} of {len(paired)}"])
    parts = [
        f"Teacher on CIFAR-100's test set: {teacher:.1%}.",
        markdown_table(["arm", "CIFAR-10 test accuracy, %", "seeds", "against from scratch"], reached),
        markdown_table(["claimed order", "measured difference, points", "seeds that agree"], claimed),
    ]
    return page_with(PAGE, "\n\n".join(parts), MARKER)


def difference(left: dict[int, float], right: dict[int, float]) -> str:
    return "" if left is right else spread(differences(left, right), sign="+")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with the Parquet files of CIFAR-10 and CIFAR-100; the Hub without it")
    add("--work-dir", type=Path, default=ROOT / "runs" / "kdep", help="keeps the teacher and its outputs")
    add("--arms", nargs="+", choices=ARMS, default=ARMS)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--report", action="store_true", help="only write the page from the results there are")
    return parser.parse_args()


if __name__ == "__main__":
    main()
