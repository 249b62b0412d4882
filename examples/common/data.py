"""Digits, CIFAR-10 and CIFAR-100 as uint8 tensors in memory, with per-sample augmentation."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pyarrow import ArrowException
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2

IMAGE_SIZE = 32
IMAGE_COLUMN = "img"  # of the Hub's Parquet files
LARGEST = 1024  # pixels a side; more is not decoded, lest a small file fill the memory
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # those whose readers start no program and open no other file


@dataclass(frozen=True)
class Source:
    """What has to be known of a data set before it is loaded."""

    num_classes: int
    epochs: int  # default length of a run
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_padding: int
    flip: bool
    label_column: str = ""  # of the Hub's Parquet files


SOURCES = {
    # A mirrored digit is another sign, and at 8x8 pixels a shift by four would cut strokes off.
    "digits": Source(10, 10, (0.305,) * 3, (0.324,) * 3, crop_padding=2, flip=False),
    "cifar10": Source(10, 200, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 4, True, "label"),
    "cifar100": Source(100, 200, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 4, True, "fine_label"),
}


class Labelled(NamedTuple):
    """Decoded images: pixels (N, 3, 32, 32) uint8 and labels (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> "Labelled":
        return Labelled(self.pixels[indices], self.labels[indices])


class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images, each augmented on its own as it is read, normalised a batch at a time."""

    def __init__(self, data: Labelled, source: Source, augment: bool) -> None:
        self.data = data
        self.augment = augmentation(source) if augment else v2.Identity()
        self.normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(source.mean, source.std)])

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.augment(self.data.pixels[index]), self.data.labels[index]

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Channels-last, because convolutions on the CPU are then up to twice as fast."""
        pixels, labels = default_collate(samples)
        return self.normalise(pixels).to(memory_format=torch.channels_last), labels

    def collate_numbered(self, samples: list[tuple[tuple[Tensor, Tensor], int]]) -> tuple[Tensor, Tensor, Tensor]:
        """The same of samples with their numbers, as StackDataset gives them."""
        images, index = zip(*samples, strict=True)
        return *self.collate(list(images)), torch.tensor(index)


class Splits(NamedTuple):
    """The parts of a run; validation is None where nothing is held out."""

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet


def load_splits(name: str, data_dir: Path | None, limit: int | None = None, val_fraction: float = 0.0) -> Splits:
    """Load data set `name`, keep the first `limit` images of each part, hold out a validation part.

    The held-out part is the same for every seed, so that runs with different seeds compare.
    """
    train, test = load_digits(limit) if name == "digits" else load_cifar(name, data_dir, limit)
    source = SOURCES[name]
    validation = None
    if val_fraction > 0:
        train, held_out = hold_out(train, val_fraction)
        validation = ImageSet(held_out, source, augment=False)
    return Splits(ImageSet(train, source, augment=True), validation, ImageSet(test, source, augment=False))


def augmentation(source: Source) -> v2.Transform:
    steps: list[v2.Transform] = [v2.RandomCrop(IMAGE_SIZE, padding=source.crop_padding)]
    if source.flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


def hold_out(data: Labelled, fraction: float) -> tuple[Labelled, Labelled]:
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))
    held_out = max(1, round(fraction * len(order)))
    return data.take(order[held_out:]), data.take(order[:held_out])


def load_digits(limit: int | None) -> tuple[Labelled, Labelled]:
    """scikit-learn's 1,797 grey 8x8 digits, enlarged to CIFAR's shape; a stratified fifth is the test set."""
    from sklearn.datasets import load_digits as bundled_digits
    from sklearn.model_selection import train_test_split

    grey, labels = bundled_digits(return_X_y=True)
    parts = train_test_split(grey, labels, test_size=0.2, stratify=labels, random_state=0)
    train_grey, test_grey, train_labels, test_labels = parts
    return (
        digits_as_images(train_grey[:limit], train_labels[:limit]),
        digits_as_images(test_grey[:limit], test_labels[:limit]),
    )


def digits_as_images(grey: np.ndarray, labels: np.ndarray) -> Labelled:
    maps = torch.as_tensor(grey, dtype=torch.float32).view(-1, 1, 8, 8) * (255 / 16)
    enlarged = F.interpolate(maps, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    return Labelled(enlarged.round().byte().repeat(1, 3, 1, 1), torch.as_tensor(labels))


def load_cifar(name: str, data_dir: Path | None, limit: int | None) -> tuple[Labelled, Labelled]:
    tables = from_hub(name) if data_dir is None else from_parquet(name, data_dir)
    where = f"uoft-cs/{name}" if data_dir is None else str(data_dir)
    train, test = (decode(tables[part].slice(0, limit), name, f"{where}, {part}") for part in ("train", "test"))
    return train, test


def from_hub(name: str) -> dict[str, pa.Table]:
    import datasets  # takes seconds, and local files do not need it

    try:
        parts = datasets.load_dataset(f"uoft-cs/{name}")
    except Exception as error:  # each layer below has its own type for "no network"
        raise SystemExit(
            f"--dataset {name}: cannot be read from the Hugging Face Hub ({error}). "
            f"Either connect to the network (and unset HF_HUB_OFFLINE) or pass --data-dir with "
            f"the folder that holds uoft-cs/{name}'s Parquet files."
        ) from error
    return {part: data.with_format("arrow")[:] for part, data in parts.items()}


def from_parquet(name: str, data_dir: Path) -> dict[str, pa.Table]:
    """Read image and label column; nothing in the files is decoded or followed here."""
    folder = parquet_folder(name, data_dir)
    files = {part: sorted(folder.glob(f"{part}*.parquet")) for part in ("train", "test")}
    for part, paths in files.items():
        if not paths:
            raise SystemExit(f"--data-dir: {folder} holds no {part}*.parquet")
        for path in paths:
            check_columns(path, name)
    columns = [IMAGE_COLUMN, SOURCES[name].label_column]
    try:
        return {
            part: pa.concat_tables([pq.ParquetFile(path).read(columns) for path in paths])
            for part, paths in files.items()
        }
    except (ArrowException, OSError) as error:
        raise SystemExit(f"--data-dir: the Parquet files in {folder} are damaged: {error}") from error


def parquet_folder(name: str, data_dir: Path) -> Path:
    """The one folder at or below `data_dir` with Parquet files, of several the one named `name`."""
    if not data_dir.is_dir():
        raise SystemExit(f"--data-dir: {data_dir} is not a folder")
    found = sorted({path.parent for path in data_dir.rglob("*.parquet")})
    named = [folder for folder in found if name in folder.relative_to(data_dir).parts]
    if data_dir in found:
        return data_dir
    if len(found) == 1:
        return found[0]
    if len(named) == 1:
        return named[0]
    if not found:
        raise SystemExit(f"--data-dir: no Parquet file in or below {data_dir}")
    listed = ", ".join(map(str, found))
    raise SystemExit(f"--data-dir: several folders hold Parquet files, name one of: {listed}")


def check_columns(path: Path, name: str) -> None:
    """Fail early, naming the file: `datasets` would name neither the file nor the column."""
    try:
        columns = pq.read_schema(path).names
    except (ArrowException, OSError) as error:
        raise SystemExit(f"--data-dir: {path} is not a readable Parquet file: {error}") from error
    wanted = [IMAGE_COLUMN, SOURCES[name].label_column]
    if not set(wanted) <= set(columns):
        raise SystemExit(f"--data-dir: {path} has columns {columns}; {name} needs {wanted}")


def decode(table: pa.Table, name: str, where: str) -> Labelled:
    label_column, num_classes = SOURCES[name].label_column, SOURCES[name].num_classes
    try:
        pixels = decode_images(table[IMAGE_COLUMN])
        labels = torch.tensor(class_numbers(table[label_column]))
    except ValueError as error:
        raise SystemExit(f"{where}: columns {IMAGE_COLUMN} or {label_column} unreadable: {error}") from error
    if pixels.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        size = "x".join(map(str, pixels.shape[2:]))
        raise SystemExit(f"{where}: {name}'s images are {IMAGE_SIZE}x{IMAGE_SIZE}, these are {size}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise SystemExit(f"{where}: {label_column} lies outside 0 .. {num_classes - 1}")
    return Labelled(pixels, labels)


def decode_images(column: pa.ChunkedArray) -> Tensor:
    """Return pixels (N, 3, H, W) uint8. A path beside the bytes is never followed: the file may come from anybody."""
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise ValueError(f"{IMAGE_COLUMN} holds {kind} where the images' own bytes have to be")
    images = [decode_image(content.as_py(), row) for row, content in enumerate(column)]
    if len({image.shape for image in images}) != 1:
        raise ValueError(f"{IMAGE_COLUMN} holds no images" if not images else "the images differ in size")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def decode_image(content: bytes | None, row: int) -> NDArray[np.uint8]:
    """Return pixels (H, W, 3)."""
    if content is None:
        raise ValueError(
            f"row {row} of {IMAGE_COLUMN} holds no image bytes; images are read from inside the file only, never from "
            f"a path or an address"
        )
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            if max(image.size) > LARGEST:
                raise ValueError(f"{image.size[1]}x{image.size[0]} pixels")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's readers each raise their own
        raise ValueError(f"row {row} of {IMAGE_COLUMN} is no readable image: {error}") from error


def class_numbers(column: pa.ChunkedArray) -> list[int]:
    if not pa.types.is_integer(column.type) or column.null_count:
        missing = f" and {column.null_count} rows without" if column.null_count else ""
        raise ValueError(f"the labels have to be integers; the column holds {column.type}{missing}")
    return column.to_pylist()
