"""A small network on few labels, some of them wrong: plain, with the two lines, and with two label terms besides.

    python examples/compare.py                            # a minute or two on two CPU cores; draws runs/compare.png
    python examples/compare.py --labels 10 --epochs 100   # so few that nothing is gained

The data are scikit-learn's digits. Thirty images of each class are labelled for training, one label in five is wrong,
and all other images are the test set. The trainings of a seed share labelled images, initial weights and the order of
the batches, so they are compared in pairs. The result is that of the last epoch; every seed is printed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sfr
from common.options import fraction, key_value, positive, whole

METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "two lines": {},
    "class means": {"smoothing": "class_mean"},
    "early learning": {"purpose": "noisy-labels"},
}
COLUMNS = ("accuracy, %", "calibration error, %", "test loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--labels", type=whole(1, 170), default=30, help="labelled images of each class")
    add("--wrong", type=fraction, default=0.2, help="share of these labels that are wrong")
    add("--epochs", type=positive, default=40)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--picture", type=Path, default=Path("runs/compare.png"))
    add("--sfr", nargs="+", type=key_value, default=[], metavar="KEY=VALUE", help="one more method, by its switches")
    args = parser.parse_args()
    if args.sfr:
        METHODS["as given"] = dict(args.sfr)

    torch.set_num_threads(1)  # so small a network gains nothing by more, which wait for each other on a busy machine
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8) / 16
    print(f"{10 * args.labels} labelled digits, {args.wrong:.0%} of the labels wrong, {args.epochs} epochs")
    print(f"{'':24}" + "".join(f"{name:>22}" for name in COLUMNS))
    results = torch.zeros(len(args.seeds), len(METHODS), len(COLUMNS))
    for row, seed in enumerate(args.seeds):
        train, given = few_labels(labels, args.labels, args.wrong, seed)
        test = torch.ones(len(labels), dtype=torch.bool).index_fill(0, train, False)
        for column, (name, settings) in enumerate(METHODS.items()):
            model = trained(images[train], given, args.epochs, seed, settings)
            with torch.no_grad():
                results[row, column] = scores(model(images[test]), labels[test])
            label = f"seed {seed}, {name}"
            print(f"{label:24}" + "".join(f"{score:22.3f}" for score in results[row, column]), flush=True)
    print(table(results))
    draw(results, args.seeds, args.picture)
    print(f"picture: {args.picture}")


def few_labels(labels: Tensor, per_class: int, wrong: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of `per_class` random images of each digit and their labels, of which a share is wrong."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=random)
    train = torch.cat([order[labels[order] == digit][:per_class] for digit in range(10)])
    changed = torch.randperm(len(train), generator=random)[: round(wrong * len(train))]
    given = labels[train]
    given[changed] = (given[changed] + torch.randint(1, 10, (len(changed),), generator=random)) % 10
    return train, given


def trained(images: Tensor, labels: Tensor, epochs: int, seed: int, settings: dict[str, Any] | None) -> nn.Module:
    """Return the plain network, trained on images (N, 1, 8, 8) and their labels; with sfr unless `settings` is None."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    model: Any = network()
    criterion: nn.Module = nn.CrossEntropyLoss()
    if settings is not None:
        model = sfr.SFRWrapper(model)  # the two lines
        if "purpose" in settings:
            of_training: dict[str, Any] = {"num_samples": len(labels), "steps": epochs * -(-len(labels) // 25)}
            settings = sfr.SFRConfig.preset(**of_training, **settings).to_dict()
        criterion = sfr.SFRLoss(model, settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=order).split(25):
            which = {} if settings is None else {"index": batch}  # only past predictions look at it
            loss = criterion(model(images[batch]), labels[batch], **which)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return (model if settings is None else model.unwrap()).eval()


def network() -> nn.Module:
    """Two convolutions each with 8, 16 and 32 channels, on 8x8, 4x4 and 2x2 positions."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Return accuracy and expected calibration error (15 bins) in %, and cross-entropy, of logits (N, K)."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    correct = (predicted == labels).float()
    gaps = torch.zeros(15).index_add_(0, (15 * confidence).ceil().long() - 1, confidence - correct)
    calibration = gaps.abs().sum() / len(labels)
    return torch.stack([100 * correct.mean(), 100 * calibration, nn.functional.cross_entropy(logits, labels)])


def table(results: Tensor) -> str:
    """Means ± standard errors over the seeds of results (seeds, methods, columns), and of the differences to plain."""
    lines = ["", "mean ± standard error over the seeds; the differences are paired"]
    rows = {name: results[:, row] for row, name in enumerate(METHODS)}
    rows |= {f"{name} - plain": scores - rows["plain"] for name, scores in rows.items() if name != "plain"}
    for name, values in rows.items():
        means, errors = values.mean(dim=0), values.std(dim=0) / len(values) ** 0.5
        sign = "+" if "-" in name else ""
        cells = (f"{mean:{sign}.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True))
        lines.append(f"{name:24}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def draw(results: Tensor, seeds: list[int], file: Path) -> None:
    """Draw a panel for each column, with a line over the methods for each seed."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    for column, axes in enumerate(figure.subplots(1, 3)):
        for seed, of_seed in zip(seeds, results[:, :, column], strict=True):
            axes.plot(list(METHODS), of_seed, marker="o", label=f"seed {seed}")
        axes.set(
            title=f"{COLUMNS[column]}\n({'higher' if column == 0 else 'lower'} is better)",
            xlim=(-0.3, len(METHODS) - 0.7),
        )
        axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
