"""Which cells there are: the schedules of training, and the plans behind docs/accuracy.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.accuracy.cell import Cell, Schedule
from benchmarks.accuracy.names import (
    EARLIER,
    FEATURES,
    FEW_LABELS,
    FEW_LABELS_UNGATED,
    FINE_TUNING,
    LADDER,
    NOISY_LABELS,
    PAST,
    PEERS,
    SMOOTHED,
    UNGATED,
    UNGATED_SMOOTHED,
    WRONG_LABELS,
    WRONG_LABELS_EARLIER,
    comparable,
)

SCHEDULES = {
    "smoke": Schedule(epochs=2, batch_size=32, per_class=4, image_size=16),
    "tenth": Schedule(epochs=100, per_class=50),
    "tenth-16px": Schedule(epochs=100, per_class=50, image_size=16),
    "tenth-16px-short": Schedule(epochs=60, per_class=50, image_size=16),
    "noise20-16px": Schedule(epochs=60, per_class=100, image_size=16, label_noise=0.2),
    "noise40-16px": Schedule(epochs=60, per_class=100, image_size=16, label_noise=0.4),
    "noise40-500": Schedule(epochs=100, per_class=500, image_size=16, label_noise=0.4, precision="fp32"),
    "noise60-500": Schedule(epochs=100, per_class=500, image_size=16, label_noise=0.6, precision="fp32"),
    "noise40-60": Schedule(epochs=60, label_noise=0.4),
    "noise40-all": Schedule(epochs=100, label_noise=0.4),
    "noise60-all": Schedule(epochs=100, label_noise=0.6),
    "full-30": Schedule(epochs=30),
    "full-30-16px": Schedule(epochs=30, image_size=16),
    "full-60": Schedule(epochs=60),
    "full-200": Schedule(epochs=200),
    "few-16px": Schedule(epochs=60, per_class=50, image_size=16, precision="fp32"),
    "full-5-16px": Schedule(epochs=5, image_size=16, precision="fp32"),
    "vit": Schedule(epochs=30, per_class=200, lr=1e-3, weight_decay=0.05, optimizer="adamw", precision="fp32"),
    "fine-tune-20": Schedule(30, 20, lr=0.01, weight_decay=1e-4, image_size=128, per_class=20, precision="fp32"),
    "fine-tune-100": Schedule(10, 20, lr=0.01, weight_decay=1e-4, image_size=128, per_class=100, precision="fp32"),
    "full-200-autoaugment": Schedule(epochs=200, augmentation="autoaugment-cutout"),
}


@dataclass(frozen=True)
class Round:
    """Cells that belong together: some arms and seeds of one schedule."""

    schedule: str
    part: str
    seeds: Sequence[int]
    arms: Sequence[str]
    model: str = "resnet20"
    dataset: str = "cifar100"

    def cells(self) -> list[Cell]:
        """Return the cells seed by seed, so that whatever is there at a kill is paired."""
        return [
            Cell(arm, seed, self.part, self.schedule, self.model, self.dataset)
            for seed in self.seeds
            for arm in self.arms
        ]


MAIN = ("vanilla", "label-smoothing", "ps-kd", "sfr", SMOOTHED, EARLIER, FEATURES, PAST)
SCANNED = (
    "vanilla",
    "label-smoothing",
    "sfr@cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@cost=sqeuclidean,weight=0.2",
    "sfr@weight=0,cost=sqeuclidean,smoothing=class_mean",
    "sfr@weight=0.05,grouping=segments,cost=sqeuclidean,smoothing=class_mean",
    "sfr@grouping=segments,cost=sqeuclidean,weight=0.2",
    "sfr@detach_deep=False,cost=sqeuclidean,weight=0.2",
)
SCANNED_SHORT = (
    *SCANNED,
    "sfr@weight=0.05,cost=sqeuclidean,smoothing=class_mean",
    "sfr@weight=0.05,cost=sqeuclidean",
    "sfr@weight=0.05,grouping=segments,cost=sqeuclidean",
    "sfr@weight=0.005,cost=sqeuclidean",
    "sfr@weight=0.5,cost=sqeuclidean",
    "sfr@weight=1,cost=sqeuclidean",
    "sfr@pairs=last,cost=sqeuclidean,weight=0.2",
    "sfr@weight=0.2",
    "sfr@solver=proximal,cost=sqeuclidean,weight=0.2",
    "sfr@smoothing=uniform,cost=sqeuclidean,weight=0.2",
    "sfr@alpha=0.3,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@grouping=segments,alpha=0.3,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@weight=0,alpha=0.3,cost=sqeuclidean,smoothing=class_mean",
    "sfr@detach_deep=False,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@weight=1,detach_deep=False,cost=sqeuclidean",
)
SCANNED_LABELS = (
    "ps-kd",
    PAST,
    "sfr@smoothing=past,cost=sqeuclidean,weight=0.2",
    "sfr@update=epoch,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@alpha=0,alpha_end=0.8,alpha_steps=3900,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-gated@gate=class,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-gated@gate=onehot,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "cutmix",
    "sfr-cutmix@cost=sqeuclidean,weight=0.2",
    "sfr-cutmix@alpha=0.5,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
)
SCANNED_ONCE = (
    "sfr@pairs=adjacent,cost=sqeuclidean,weight=0.2",
    "sfr@marginals=cross,cost=sqeuclidean,weight=0.2",
    "sfr@warmup=390,cost=sqeuclidean,weight=0.2",
    "sfr@stages=layer..2.bn2,cost=sqeuclidean,weight=0.2",
    "sfr-slow@decay=0.99,cost=sqeuclidean,weight=0.2",
    "sfr@cost=correlation,weight=0.2",
    "sfr@weight=1,cost=correlation",
    "sfr@smoothing=past,alpha=0.8,cost=sqeuclidean,weight=0.2",
    "sfr@momentum=0.05,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-gated@gate=sample,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@grouping=crop,cost=sqeuclidean,weight=0.2",
    "tfd@weight=0.2,max_grid=4",
    "tfd@weight=0.2,max_grid=4,grouping=mean",
)
SCANNED_FULL = (
    "vanilla",
    "sfr@cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-gated@gate=class,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-gated@gate=onehot,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
)
TESTED_VARIANTS = (
    "sfr@update=epoch,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-cutmix@cost=sqeuclidean,weight=0.2",
    "sfr-cutmix@alpha=0.5,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
)
# How the default was chosen: what gains nowhere less than vanilla has.
CANDIDATES = ("vanilla", "sfr", UNGATED, SMOOTHED, UNGATED_SMOOTHED)
REGIMES = [
    Round("fine-tune-20", "held-out", range(100, 104), CANDIDATES, "efficientnet-lite0", "flowers"),
    Round("few-16px", "held-out", range(100, 104), (*CANDIDATES, "sfr@gate=none,smoothing=past,alpha=0,alpha_end=0.8")),
    Round("vit", "held-out", range(100, 104), CANDIDATES, "vit-small-images", "cifar10"),
    Round("tenth-16px", "held-out", range(102, 106), ("vanilla", "sfr", FEW_LABELS, FEW_LABELS_UNGATED)),
    Round("tenth", "held-out", range(102, 104), ("vanilla", "sfr")),
    Round("full-30-16px", "held-out", range(101, 104), ("vanilla", "sfr")),
    Round("full-5-16px", "held-out", range(100, 104), CANDIDATES),
    Round("fine-tune-100", "held-out", range(100, 104), CANDIDATES, "efficientnet-lite0", "flowers"),
    Round("fine-tune-20", "held-out", range(100, 104), CANDIDATES, "efficientnet-lite0", "elpv"),
    Round("fine-tune-100", "held-out", range(100, 104), CANDIDATES, "efficientnet-lite0", "elpv"),
]
# What half an hour of a GPU has time for: all labels, and wrong ones, seed by seed.
GPU_FIRST = [
    Round("full-30", "test", range(3), ("vanilla", "sfr"), "resnet18"),
    *(
        round_
        for seed in range(3)
        for round_ in (
            Round("full-60", "test", (seed,), ("vanilla", "sfr"), "resnet18"),
            Round("noise40-60", "test", (seed,), ("vanilla", "elr", NOISY_LABELS), "resnet18"),
        )
    ),
]
# What docs/accuracy.md is made of: the scan by which choices were made, then the test, with seeds of its own.
PLANS = {
    "regimes": REGIMES,
    "fine-tuning": [
        Round("fine-tune-20", "test", range(6), tuple(FINE_TUNING), "efficientnet-lite0", dataset)
        for dataset in ("flowers", "elpv")
    ],
    "wrong-labels": [
        Round(schedule, "held-out", range(100, 103), (*WRONG_LABELS, *WRONG_LABELS_EARLIER), dataset="cifar10")
        for schedule in ("noise40-500", "noise60-500")
    ],
    "scan": [
        Round("tenth-16px-short", "held-out", (100,), SCANNED_SHORT),
        Round("tenth-16px", "held-out", (100, 101), SCANNED),
        Round("tenth-16px", "held-out", (100, 101), SCANNED_LABELS),
        Round("tenth-16px", "held-out", (100,), SCANNED_ONCE),
        Round("full-30-16px", "held-out", (100,), SCANNED_FULL),
        Round("tenth", "held-out", (100, 101), ("vanilla", EARLIER, FEATURES)),
        Round("few-16px", "held-out", (100, 101), ("sfr@weight=1",)),
        Round("vit", "held-out", (100,), ("sfr@weight=1",), "vit-small-images", "cifar10"),
        *REGIMES,
    ],
    "cpu": [
        Round("tenth-16px", "test", range(3), comparable(PEERS, 16)),
        Round("tenth-16px", "test", range(3), tuple(LADDER)),
        Round("tenth-16px", "test", range(3, 5), ("vanilla", "ps-kd", "byot", "sfr", EARLIER, PAST)),
        Round("tenth-16px", "test", range(3), TESTED_VARIANTS),
        Round("tenth-16px", "test", range(5), (FEW_LABELS,)),
        *(
            Round("tenth-16px-short", "test", range(3), ("cutmix", "sfr-cutmix@gate=none"), model)
            for model in ("resnet20", "resnet56")
        ),
        Round("noise20-16px", "test", range(3), MAIN),
        Round("noise40-16px", "test", range(3), MAIN),
        Round("noise40-16px", "test", range(3), ("elr", NOISY_LABELS)),
        Round("full-30-16px", "test", range(3), MAIN),
        Round("noise20-16px", "test", (0,), comparable(PEERS, 16)),
        Round("noise40-16px", "test", (0,), comparable(PEERS, 16)),
        Round("full-30-16px", "test", (0,), comparable(PEERS, 16)),
        Round("tenth", "test", range(3), ("byot", *MAIN)),
    ],
    "gpu": [
        *GPU_FIRST,
        Round("full-60", "test", range(3), (UNGATED,), "resnet18"),
        Round("full-200", "test", range(3), MAIN, "resnet18"),
        Round("noise40-all", "test", range(3), tuple(WRONG_LABELS), "resnet18"),
        Round("noise60-all", "test", range(3), tuple(WRONG_LABELS), "resnet18"),
        Round("full-200", "test", range(5), comparable(PEERS, 32), "resnet18"),
        Round("full-200", "test", range(3), tuple(LADDER), "resnet18"),
        Round("full-200-autoaugment", "test", range(3), MAIN, "resnet18"),
        Round("full-200", "test", range(3), MAIN, "wrn_28_10"),
    ],
}
