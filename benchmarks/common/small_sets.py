"""Two small data sets of 128 pixels for fine-tuning: photographs of five flowers, and images of solar cells."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from examples.common.data import Labelled, Source, hold_out, parquet_folder

SIZE = 128
TEST_CELLS = 0.2  # of the solar cells, which come without a split
SMALL_SOURCES = {
    # The mean and deviation are those that EfficientNet-Lite was trained with; a crop moves by an eighth of the image.
    "flowers": Source(5, 30, (0.5,) * 3, (0.5,) * 3, crop_padding=4, flip=True, label_column="label"),
    "elpv": Source(2, 30, (0.5,) * 3, (0.5,) * 3, crop_padding=4, flip=True),
}


def load_small(name: str, data_dir: Path | None) -> tuple[Labelled, Labelled]:
    """Return the training and the test part of one of :data:`SMALL_SOURCES`.

    "flowers" is read from Parquet files below `data_dir`; "elpv" (Buerhop-Lutz et al., 2018: 2,624 images of solar
    cells with the probability of a defect; above one half counts as defective) from the package ``elpv-dataset``.

    Raises:
        SystemExit: if the files or the package are missing, saying where they come from.
    """
    if name == "elpv":
        return load_elpv()
    if data_dir is None:
        raise SystemExit(f"--dataset {name} is read from local Parquet files: pass --data-dir")
    folder = parquet_folder(name, data_dir)
    return flowers(folder, "train"), flowers(folder, "test")


def flowers(folder: Path, part: str) -> Labelled:
    tables = [pq.read_table(file) for file in sorted(folder.glob(f"{part}-*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    pixels = torch.stack([pixels_of(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])
    return Labelled(pixels, torch.tensor([row["label"] for row in rows]))


def load_elpv() -> tuple[Labelled, Labelled]:
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as error:
        raise SystemExit('--dataset elpv needs the package elpv-dataset: pip install -e ".[benchmarks]"') from error
    images, probabilities, _ = load_dataset()
    pixels = torch.stack([pixels_of(Image.fromarray(image)) for image in images])
    labels = torch.from_numpy(np.asarray(probabilities) > 0.5).long()
    return hold_out(Labelled(pixels, labels), TEST_CELLS)


def pixels_of(image: Image.Image) -> Tensor:
    """Return an image as uint8 (3, 128, 128)."""
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
