"""A teacher's features of fixed views of images, computed once and kept on the disk."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .atomic_file import replace_file, replace_text
from .checkpoint_files import checksum, file_damage
from .data import IMAGE_SIZE, ImageSet, Source, Splits
from .teachers import Teacher

BATCH = 250


class FixedViews(ImageSet):
    """Images cut and mirrored once for each of some views, with the teacher's features of the view as labels.

    Args:
        images: the images.
        source: says how far a crop may move, and whether an image may be mirrored.
        views: how many views there are; None for the images as they are, which are then the only view.

    Attributes:
        view: the number of the view that is shown.
        features: of each view, (N, D).
    """

    def __init__(self, images: ImageSet, source: Source, views: int | None) -> None:
        super().__init__(images.data, source, augment=False)
        self.padding, flip = (source.crop_padding, source.flip) if views else (0, False)
        self.windows = [draw_windows(len(images), self.padding, flip, seed) for seed in range(views or 1)]
        self.view = 0
        self.features: list[Any] = []

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the view of an image, (3, 32, 32) uint8, and its features (D,); its label as long as it has none."""
        top, left, mirrored = self.windows[self.view][index].tolist()
        padded = F.pad(self.data.pixels[index], (self.padding,) * 4)
        image = padded[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        given = torch.tensor(self.features[self.view][index]) if self.features else self.data.labels[index]
        return (image.flip(2) if mirrored else image), given


def draw_windows(count: int, padding: int, flip: bool, seed: int) -> Tensor:
    """Return for each image the top and the left of its crop, and whether it is mirrored, (N, 3)."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
    mirrored = torch.randint(0, 1 + flip, (count, 1), generator=generator)
    return torch.cat([corners, mirrored], dim=1)


def with_features(
    splits: Splits, source: Source, teacher: Teacher, recipe: Mapping[str, Any], views: int, folder: Path
) -> Splits:
    """Return the parts of a run with the teacher's features in the place of the labels.

    Args:
        splits: the images.
        source: their data set.
        teacher: computes the features that are not in the folder.
        recipe: what decides the features besides the teacher's weights, the images and the precision.
        views: of each training image; the other parts are shown as they are.
        folder: where the features are kept.
    """
    parts = {
        name: part and FixedViews(part, source, views if name == "train" else None)
        for name, part in splits._asdict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    own = {**recipe, "weights": digest(teacher.network.state_dict()), "precision": teacher.accelerator.mixed_precision}
    for part in parts.values():
        if part:
            found = [features_of_view(part, view, teacher, own, folder) for view in range(len(part.windows))]
            part.features, part.view = found, 0
    return Splits(**parts)


def features_of_view(part: FixedViews, view: int, teacher: Teacher, own: dict[str, Any], folder: Path) -> Any:
    """Return the features of one view, memory-mapped, (N, D) float32; computed if they are missing or damaged."""
    part.view = view
    images = {"pixels": part.data.pixels, "windows": part.windows[view] - part.padding}
    key = own | {"images": digest(images)}
    file = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npy"
    with teacher.accelerator.local_main_process_first():  # it computes, the others read
        if not sound(file):
            replace_file(file, lambda partial: write_features(part, teacher, partial))
            replace_text(file.with_suffix(".json"), json.dumps(key | {"sha256": checksum(file)}, indent=2) + "\n")
    return np.load(file, mmap_mode="r")


def sound(file: Path) -> bool:
    """Whether a file of features is there and is what was written."""
    try:
        written = json.loads(file.with_suffix(".json").read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return file_damage(file, written) is None


def write_features(part: FixedViews, teacher: Teacher, file: Path) -> None:
    """Compute the features of the view that a part shows, and write them."""
    loader = DataLoader(part, BATCH, collate_fn=part.collate)
    device = teacher.accelerator.device
    bar = tqdm(loader, "teacher's features", disable=not teacher.accelerator.is_local_main_process, leave=False)
    found: Any = None
    for number, (images, labels) in enumerate(bar):
        features = teacher(images.to(device), labels).cpu().numpy()
        if found is None:
            found = np.lib.format.open_memmap(file, "w+", np.float32, (len(part), features.shape[1]))
        found[number * BATCH : number * BATCH + len(features)] = features
    found.flush()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, in hexadecimal."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
