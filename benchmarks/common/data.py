"""The data sets of the benchmarks, and the part of each that a network trains on or is judged on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common.small_sets import SMALL_SOURCES, load_small
from examples.common.atomic_file import replace_file
from examples.common.data import SOURCES as CIFAR_SOURCES
from examples.common.data import Labelled, hold_out, load_splits

SOURCES = CIFAR_SOURCES | SMALL_SOURCES
HELD_OUT = 5000  # of CIFAR's 50,000 training images, for every choice that is made
HELD_OUT_SMALL = 0.2  # of the training images of a small data set


class Parts(NamedTuple):
    """What a cell trains on and what it is judged on."""

    train: Labelled
    judged: Labelled


def load_parts(dataset: str, data_dir: Path | None, cache: Path, part: str) -> Parts:
    """Return the training images without the held-out ones, and these; or all of them, and the test set.

    The decoded images are kept in the folder `cache`.
    """
    train, test = (Labelled(*split) for split in torch.load(decoded(dataset, data_dir, cache)))
    if part == "test":
        return Parts(train, test)
    share = HELD_OUT_SMALL if dataset in SMALL_SOURCES else HELD_OUT / len(train.labels)
    return Parts(*hold_out(train, share))


def decoded(dataset: str, data_dir: Path | None, cache: Path) -> Path:
    """Return the file of a data set's decoded images, pixels and labels of training and test; made if it is missing."""
    file = cache / f"{dataset}.pt"
    if not file.exists():
        parts = both_parts(dataset, data_dir)
        cache.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda path: torch.save([tuple(part) for part in parts], path))
    return file


def both_parts(dataset: str, data_dir: Path | None) -> tuple[Labelled, Labelled]:
    """Return all training and all test images of a data set."""
    if dataset in SMALL_SOURCES:
        return load_small(dataset, data_dir)
    splits = load_splits(dataset, data_dir)
    return splits.train.data, splits.test.data
