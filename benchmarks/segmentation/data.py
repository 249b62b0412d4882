"""CamVid (Brostow et al., 2009): road scenes with a class for every pixel, at a quarter of the recorded resolution."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from examples.common.atomic_file import replace_file
from examples.common.data import parquet_folder

NUM_CLASSES, VOID = 11, 11
SIZE = (88, 120)  # height and width, from 180 x 240
SMALLEST_WINDOW = 0.6  # of the image's height and width, that an augmented image shows


class Scenes(NamedTuple):
    """Images (N, 3, H, W) and their annotation (N, H, W), both uint8; 11 is a pixel without a class."""

    pixels: Tensor
    classes: Tensor

    def take(self, which: Tensor | slice) -> Scenes:
        """Return some of the scenes."""
        return Scenes(self.pixels[which], self.classes[which])


def load_scenes(data_dir: Path, cache: Path, part: str) -> Scenes:
    """Return a part of CamVid, "train", "validation" or "test", from Parquet files below a folder.

    The decoded images are kept in the folder `cache`.
    """
    file = cache / f"camvid-{part}.pt"
    if not file.exists():
        folder = parquet_folder("camvid", data_dir)
        rows = [row for file in sorted(folder.glob(f"{part}-*.parquet")) for row in pq.read_table(file).to_pylist()]
        pixels = torch.stack([decoded(row["image"]["bytes"], "RGB", Image.Resampling.BOX) for row in rows])
        classes = torch.stack([decoded(row["annotation"]["bytes"], None, Image.Resampling.NEAREST) for row in rows])
        cache.mkdir(parents=True, exist_ok=True)
        scenes = pixels.permute(0, 3, 1, 2).contiguous(), classes
        replace_file(file, lambda path: torch.save(scenes, path))
    return Scenes(*torch.load(file))


def decoded(data: bytes, mode: str | None, resampling: Image.Resampling) -> Tensor:
    image: Image.Image = Image.open(io.BytesIO(data))
    image = image.convert(mode) if mode else image
    return torch.from_numpy(np.array(image.resize(SIZE[::-1], resampling)))


def normalised(pixels: Tensor) -> Tensor:
    """Return uint8 images as float, about between -2 and 2, channels last in memory."""
    return pixels.float().sub_(127.5).div_(64).to(memory_format=torch.channels_last)


def augmented(scenes: Scenes, draw: torch.Generator) -> Scenes:
    """Return scenes of which each is a window of the image at random, half of them mirrored, of the same size."""
    height, width = scenes.classes.shape[1:]
    images, classes = [], []
    for pixels, own in zip(scenes.pixels, scenes.classes, strict=True):
        share, top, left, mirrored = torch.rand(4, generator=draw).tolist()
        share = SMALLEST_WINDOW + (1 - SMALLEST_WINDOW) * share
        window = round(share * height), round(share * width)
        rows = torch.arange(height) * window[0] // height + round(top * (height - window[0]))
        columns = torch.arange(width) * window[1] // width + round(left * (width - window[1]))
        columns = columns.flip(0) if mirrored < 0.5 else columns
        images.append(pixels[:, rows[:, None], columns])
        classes.append(own[rows[:, None], columns])
    return Scenes(torch.stack(images), torch.stack(classes))
