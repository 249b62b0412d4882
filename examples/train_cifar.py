"""Train an image classifier with self-feature regularization, with label smoothing or with neither.

    python examples/train_cifar.py                                       # digits, a minute
    python examples/train_cifar.py --dataset cifar100 --model resnet18   # from the Hub

Several processes, GPUs and mixed precision come with `accelerate launch examples/train_cifar.py`,
by `accelerate config` or its flags. Two processes on the CPU (`--cpu --num_processes 2` would start
only one):

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/train_cifar.py
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/train_cifar.py

A run that was killed continues with `--resume` and otherwise the same command line, after its last
whole epoch; on the CPU it ends with the same weights as an undisturbed run. If it was killed within
its first epoch, `--resume` starts it again, so a job that is queued again can always pass it. The
run keeps its two newest checkpoints with checksums of all files: a damaged one is named and skipped.
Resume only your own checkpoints: Accelerate reads parts of them with pickle, and a checkpoint
from somebody else can execute code. The result of a run is that of its last epoch, never of its best.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import set_seed
from torch import nn
from torch.optim import SGD

import sfr
from common import data, learning_rate, metrics, models, options, runs, weights


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Train as the command line `argv` says; return the trained, plain model."""
    args = parse_arguments(argv)
    accelerator = runs.build_accelerator(args)
    model = train(args, accelerator)
    accelerator.end_training()
    return model


def train(args: argparse.Namespace, accelerator: Accelerator) -> nn.Module:
    """Go through one whole run, from its data set to its folder; return the trained, plain model."""
    with runs.opened(args, accelerator, {"sfr": sfr_settings(args)}) as run:
        run.load(lambda: data.load_splits(args.dataset, args.data_dir, args.limit, args.val_fraction))
        train_loader, test_loader, curve_loader, curve = run.loaders()

        set_seed(args.seed)  # the same initial weights in all processes ...
        model, criterion = build(args, accelerator.device)
        set_seed(args.seed, device_specific=True)  # ... but crops and flips of their own
        optimizer = SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
        steps = args.epochs * len(train_loader)
        schedule = learning_rate.warmup_then_cosine(optimizer, steps)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        steps = min(steps, args.max_steps or steps)
        size = sum(parameter.numel() for parameter in model.parameters())

        for epoch in run.epochs(train_loader, steps, criterion, f"{args.model}: {size:,} parameters"):
            model.train()
            lr = schedule.get_last_lr()[0]
            for images, labels, index in epoch:
                if isinstance(criterion, sfr.SFRLoss):
                    loss = criterion(model(images), labels, index=index)  # the numbers are for smoothing="past"
                    epoch.note(loss=loss, label_loss=criterion.last.label, feature_loss=criterion.last.feature)
                else:
                    loss = criterion(model(images), labels)
                    epoch.note(loss=loss)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            runs.average_buffers(accelerator, model)
            if isinstance(criterion, sfr.SFRLoss):
                criterion.end_epoch()
            means = {f"train_{name}": mean for name, mean in epoch.means().items()}
            trained = {"epoch": epoch.number, "step": epoch.last_step, "lr": lr, **means, **epoch.speed()}
            run.keep({**trained, **evaluate(model, curve_loader, curve, accelerator)})

        end = evaluate(model, test_loader, "test", accelerator)
        run.finish(accelerator.get_state_dict(model), end)
    plain = accelerator.unwrap_model(model)
    return plain.unwrap() if isinstance(plain, sfr.SFRWrapper) else plain


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, part: str, accelerator: Accelerator) -> dict[str, Any]:
    """Metrics over all processes, the padding of the last batch left out."""
    model.eval()
    metric = metrics.ClassificationMetric(keep_in_memory=True)
    for images, labels in loader:
        gathered = accelerator.gather_for_metrics((model(images).float(), labels))
        logits, labels = (tensor.cpu().numpy() for tensor in gathered)
        metric.add_batch(predictions=logits, references=labels)
    return {f"{part}_{name}": value for name, value in (metric.compute() or {}).items()}


def sfr_settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return all fields of the method's configuration, None for another method."""
    try:
        return sfr.SFRConfig.from_dict(dict(args.sfr)).to_dict() if args.method == "sfr" else None
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--sfr: {error}") from error


def build(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return the model and its criterion: the two lines, or cross-entropy."""
    model = models.build_model(args.model, data.SOURCES[args.dataset].num_classes)
    if args.init:
        weights.load_backbone(model, args.init)
    model = model.to(memory_format=torch.channels_last).to(device)
    if args.method == "sfr":
        image = torch.zeros(1, 3, data.IMAGE_SIZE, data.IMAGE_SIZE, device=device)
        try:
            wrapped = sfr.SFRWrapper(model, stages=args.stages, example_input=image)
        except ValueError as error:
            raise SystemExit(f"--model {args.model}: {error}") from error
        return wrapped, sfr.SFRLoss(wrapped, dict(args.sfr)).to(device)
    smoothing = 0.1 if args.method == "label-smoothing" else 0.0
    return model, nn.CrossEntropyLoss(label_smoothing=smoothing)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=list(data.SOURCES), default="digits", help="digits needs no download")
    add("--data-dir", type=Path, help="folder with CIFAR's Parquet files, in place of the Hub")
    add("--model", default="resnet20", help="resnet20, wrn_16_2, any torchvision or timm name")
    add("--init", metavar="FILE", help="start from the weights in this model.pt")
    add("--method", choices=["sfr", "label-smoothing", "vanilla"], default="sfr")
    add("--sfr", nargs="+", type=options.key_value, default=[], metavar="KEY=VALUE", help="arguments of SFRLoss")
    add("--stages", metavar="REGEX", help="stages of the model for sfr, by their names; default: found")
    add("--epochs", type=options.positive, help="default 10 for digits, 200 for CIFAR")
    add("--batch-size", type=options.positive, default=128, help="global, split over the processes")
    add("--lr", type=float, default=0.1, help="peak; not scaled by the number of processes")
    add("--weight-decay", type=float, default=5e-4)
    add("--seed", type=int, default=0)
    add("--val-fraction", type=options.fraction, default=0.0, help="hold out this part of the training set")
    add("--max-steps", type=options.positive, help="stop after so many optimizer steps")
    add("--limit", type=options.positive, metavar="N", help="first N training and test images only")
    add("--num-workers", type=int, default=0, help="loading processes per training process")
    add("--output-dir", type=Path, help="default runs/DATASET-MODEL-METHOD-seedSEED, if taken with -2, -3 ...")
    add("--resume", action="store_true", help="continue the run in --output-dir, default the newest; or start one")
    add("--tracker", choices=["none", *LOGGER_TYPE_TO_CLASS], default="none")
    args = parser.parse_args(argv)
    if (args.sfr or args.stages) and args.method != "sfr":
        parser.error("--sfr and --stages need --method sfr")
    if args.data_dir and args.dataset == "digits":
        parser.error("--data-dir is for CIFAR: the digits come with scikit-learn")
    args.epochs = args.epochs or data.SOURCES[args.dataset].epochs
    args.default_output_dir = Path("runs", f"{args.dataset}-{args.model}-{args.method}-seed{args.seed}")
    return args


if __name__ == "__main__":
    main()
