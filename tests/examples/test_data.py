"""Digits and local Parquet files become tensors; files that cannot are named in the error."""

import io
import json
import socket
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, Image
from PIL import Image as Pillow

from common.data import load_splits


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pictures(count, size=32):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_parquet(file: Path, images, columns):
    """Write images and {column: (labels, number of classes)} as the Hub's files have them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features = {"img": Image()}
    features |= {name: ClassLabel(num_classes=count) for name, (_, count) in columns.items()}
    values = {"img": [Pillow.fromarray(image) for image in images]}
    values |= {name: labels for name, (labels, _) in columns.items()}
    datasets.Dataset.from_dict(values, features=Features(features)).to_parquet(file)


def write_cifar100(folder, count=6, **changed):
    images = changed.get("images", pictures(count))
    columns = {"fine_label": (list(range(count)), 100), "coarse_label": ([0] * count, 20)}
    for part in ("train-00000-of-00001", "test-00000-of-00001"):
        write_parquet(folder / f"{part}.parquet", images, columns)


def write_cifar10(folder, count=6):
    for part in ("train-00000-of-00001", "test-00000-of-00001"):
        write_parquet(folder / f"{part}.parquet", pictures(count), {"label": (list(range(count)), 10)})


def test_digits_split_is_the_same_every_time_and_has_every_class_in_proportion():
    first, second = load_splits("digits", None), load_splits("digits", None)
    assert (len(first.train), len(first.test), first.validation) == (1437, 360, None)
    assert torch.equal(first.test.data.pixels, second.test.data.pixels)
    assert torch.bincount(first.test.data.labels).tolist() == pytest.approx([36] * 10, abs=2)


def test_digits_cover_the_whole_range_of_a_byte_in_cifars_shape():
    pixels = load_splits("digits", None, limit=100).train.data.pixels
    assert pixels.shape == (100, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_held_out_images_leave_the_training_set_and_are_not_augmented():
    whole = load_splits("digits", None, limit=100).train.data
    splits = load_splits("digits", None, limit=100, val_fraction=0.2)
    assert (len(splits.train), len(splits.validation)) == (80, 20)
    parts = torch.cat([splits.train.data.pixels, splits.validation.data.pixels])
    assert sorted(map(hash_of, parts)) == sorted(map(hash_of, whole.pixels))
    assert torch.equal(splits.validation[0][0], splits.validation.data.pixels[0])


def hash_of(image):
    return image.numpy().tobytes()


def test_training_images_are_augmented_anew_and_test_images_never():
    splits = load_splits("digits", None, limit=10)
    torch.manual_seed(0)
    assert len({hash_of(splits.train[0][0]) for _ in range(20)}) > 1
    assert len({hash_of(splits.test[0][0]) for _ in range(20)}) == 1


def test_a_batch_is_normalised_and_channels_last():
    train = load_splits("digits", None).train
    images, labels = train.collate([(train.data.pixels[i], train.data.labels[i]) for i in range(500)])
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.mean().item() == pytest.approx(0, abs=0.05)
    assert images.std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(labels, train.data.labels[:500])


@pytest.mark.parametrize("below", ["", "cifar100", "cifar100/cifar100"])
def test_cifar100_is_read_from_the_folder_or_one_above_it(tmp_path, below):
    write_cifar100(tmp_path / "data" / below)
    splits = load_splits("cifar100", tmp_path / "data")
    expected = torch.from_numpy(pictures(6)).permute(0, 3, 1, 2)
    assert torch.equal(splits.train.data.pixels, expected)
    assert splits.test.data.labels.tolist() == list(range(6))


def test_a_folder_with_both_sets_is_read_by_name(tmp_path):
    write_cifar100(tmp_path / "data/cifar100/cifar100", count=6)
    write_cifar10(tmp_path / "data/cifar10/plain_text", count=5)
    assert len(load_splits("cifar100", tmp_path / "data").train) == 6
    assert len(load_splits("cifar10", tmp_path / "data").train) == 5


def test_limit_keeps_the_first_images_of_both_parts(tmp_path):
    write_cifar100(tmp_path / "data")
    splits = load_splits("cifar100", tmp_path / "data", limit=4)
    assert splits.train.data.labels.tolist() == splits.test.data.labels.tolist() == [0, 1, 2, 3]


def test_a_damaged_file_is_named(tmp_path):
    write_cifar100(tmp_path / "data")
    (tmp_path / "data/test-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(SystemExit, match=r"test-00000-of-00001\.parquet is not a readable Parquet"):
        load_splits("cifar100", tmp_path / "data")


def test_a_damaged_page_is_an_error_that_names_the_folder(tmp_path):
    write_cifar100(tmp_path / "data")
    file = tmp_path / "data/train-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    content[4:2000] = bytes(1996)  # after the leading magic, before the footer
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=f"files in {tmp_path / 'data'} are damaged"):
        load_splits("cifar100", tmp_path / "data")


def test_foreign_columns_are_listed_with_the_ones_needed(tmp_path):
    write_cifar10(tmp_path / "data")
    with pytest.raises(SystemExit, match=r"has columns \['img', 'label'\]; cifar100 needs .*fine_label"):
        load_splits("cifar100", tmp_path / "data")


def test_images_of_another_size_are_refused(tmp_path):
    write_cifar100(tmp_path / "data", images=pictures(6, size=28))
    with pytest.raises(SystemExit, match="32x32, these are 28x28"):
        load_splits("cifar100", tmp_path / "data")


def test_labels_out_of_range_are_refused(tmp_path):
    for part in ("train", "test"):
        write_parquet(tmp_path / "data" / f"{part}.parquet", pictures(2), {"label": ([3, 12], 20)})
    with pytest.raises(SystemExit, match=r"label lies outside 0 \.\. 9"):
        load_splits("cifar10", tmp_path / "data")


def test_bytes_that_are_no_image_are_refused(tmp_path):
    rows = {"img": [{"bytes": b"no image", "path": None}], "label": [0]}
    for part in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / f"{part}.parquet")
    with pytest.raises(SystemExit, match="columns img or label unreadable"):
        load_splits("cifar10", tmp_path / "data")


def write_foreign(folder, column, labels=None, metadata=None):
    """Parquet as anybody may write it: `column` holds the images, `metadata` is what `datasets` would believe."""
    folder.mkdir(exist_ok=True)
    table = pa.table({"img": column, "label": labels or list(range(len(column)))})
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    for part in ("train", "test"):
        pq.write_table(table, folder / f"{part}.parquet")


def png(image):
    buffer = io.BytesIO()
    Pillow.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def _nothing_but_the_parquet_files_is_opened(monkeypatch):
    """Names and addresses in the files lead to an error before anything is opened."""

    def refused(*args, **kwargs):
        raise AssertionError(f"opened {args}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(datasets.features.image, "xopen", refused)
    opened = Pillow.open
    monkeypatch.setattr(
        Pillow, "open", lambda file, *a, **k: refused(file) if isinstance(file, str) else opened(file, *a, **k)
    )


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.usefixtures("_nothing_but_the_parquet_files_is_opened")
@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://127.0.0.1:9/image.png", "zip://a.png::http://127.0.0.1:9/b.zip", None]
)
def test_an_image_without_bytes_is_refused_by_row_and_its_path_never_followed(tmp_path, path):
    good = {"bytes": png(pictures(1)[0]), "path": "/etc/passwd"}
    write_foreign(tmp_path / "data", pa.array([good, {"bytes": None, "path": path}], STRUCT))
    with pytest.raises(SystemExit, match=r"train.*row 1 of img holds no image bytes; .* never from a path"):
        load_splits("cifar10", tmp_path / "data")
    write_foreign(tmp_path / "data", pa.array([good, None], STRUCT))
    with pytest.raises(SystemExit, match="row 1 of img holds no image bytes"):
        load_splits("cifar10", tmp_path / "data")


@pytest.mark.usefixtures("_nothing_but_the_parquet_files_is_opened")
@pytest.mark.parametrize(
    ("column", "held"),
    [
        (pa.array(["/etc/passwd"]), "string"),
        (pa.array([{"path": "/etc/passwd"}]), "struct<path: string>"),
        (pa.array([{"bytes": "/etc/passwd"}]), "struct<bytes: string>"),
        (pa.array([[1, 2]]), "list<"),
    ],
)
def test_a_column_of_anything_but_bytes_is_refused(tmp_path, column, held):
    write_foreign(tmp_path / "data", column)
    with pytest.raises(SystemExit, match=rf"img holds {held}.* where the images' own bytes have to be"):
        load_splits("cifar10", tmp_path / "data")


@pytest.mark.usefixtures("_nothing_but_the_parquet_files_is_opened")
def test_a_label_column_that_poses_as_an_image_is_refused(tmp_path):
    images = pa.array([{"bytes": png(pictures(1)[0]), "path": None}], STRUCT)
    write_foreign(
        tmp_path / "data",
        images,
        labels=pa.array([{"bytes": None, "path": "/etc/passwd"}], STRUCT),
        metadata={"img": {"_type": "Image"}, "label": {"_type": "Image"}},
    )
    with pytest.raises(SystemExit, match="labels have to be integers"):
        load_splits("cifar10", tmp_path / "data")


@pytest.mark.parametrize("kind", [STRUCT, pa.binary(), pa.large_binary(), pa.struct({"bytes": pa.large_binary()})])
def test_images_are_read_from_every_column_of_bytes(tmp_path, kind):
    content = [png(image) for image in pictures(3)]
    rows = [{"bytes": image} for image in content] if pa.types.is_struct(kind) else content
    write_foreign(tmp_path / "data", pa.array(rows, kind))
    pixels = load_splits("cifar10", tmp_path / "data").train.data.pixels
    assert torch.equal(pixels, torch.from_numpy(pictures(3)).permute(0, 3, 1, 2))


def test_formats_whose_readers_start_programs_are_refused(tmp_path):
    buffer = io.BytesIO()
    Pillow.fromarray(pictures(1)[0]).save(buffer, "eps")  # Pillow gives it to Ghostscript
    write_foreign(tmp_path / "data", pa.array([buffer.getvalue()]))
    with pytest.raises(SystemExit, match="row 0 of img is no readable image"):
        load_splits("cifar10", tmp_path / "data")


def test_an_image_too_large_for_the_memory_is_refused_before_it_is_decoded(tmp_path):
    write_foreign(tmp_path / "data", pa.array([png(np.zeros((2000, 2000, 3), np.uint8))]))
    with pytest.raises(SystemExit, match=r"row 0 of img .*2000x2000 pixels"):
        load_splits("cifar10", tmp_path / "data")


def test_images_of_several_sizes_and_files_without_images_are_refused(tmp_path):
    write_foreign(tmp_path / "data", pa.array([png(pictures(1)[0]), png(pictures(1, size=28)[0])]))
    with pytest.raises(SystemExit, match="differ in size"):
        load_splits("cifar10", tmp_path / "data")
    write_foreign(tmp_path / "data", pa.array([], pa.binary()), labels=pa.array([], pa.int64()))
    with pytest.raises(SystemExit, match="holds no images"):
        load_splits("cifar10", tmp_path / "data")


@pytest.mark.parametrize("labels", [[0.5], [None], ["0"]])
def test_labels_that_are_no_integers_are_refused(tmp_path, labels):
    write_foreign(tmp_path / "data", pa.array([png(pictures(1)[0])]), labels=labels)
    with pytest.raises(SystemExit, match="labels have to be integers"):
        load_splits("cifar10", tmp_path / "data")


@pytest.mark.usefixtures("_nothing_but_the_parquet_files_is_opened")
def test_what_the_hub_gives_is_read_from_bytes_only(tmp_path, monkeypatch):
    good = {"bytes": png(pictures(1)[0]), "path": None}
    features = Features({"img": Image(), "label": ClassLabel(num_classes=10)})

    def hub(*rows):
        part = datasets.Dataset.from_dict({"img": list(rows), "label": list(range(len(rows)))}, features=features)
        monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=part, test=part))

    hub(good, good)
    assert len(load_splits("cifar10", None, limit=1).train) == 1
    assert torch.equal(
        load_splits("cifar10", None).test.data.pixels[1], torch.from_numpy(pictures(1)[0]).permute(2, 0, 1)
    )
    hub(good, {"bytes": None, "path": "/etc/passwd"})
    with pytest.raises(SystemExit, match=r"uoft-cs/cifar10, train: .*row 1 of img holds no image bytes"):
        load_splits("cifar10", None)


def test_a_missing_part_is_an_error(tmp_path):
    write_cifar100(tmp_path / "data")
    (tmp_path / "data/test-00000-of-00001.parquet").unlink()
    with pytest.raises(SystemExit, match=r"holds no test\*.parquet"):
        load_splits("cifar100", tmp_path / "data")


def test_folders_without_parquet_or_with_several_are_errors(tmp_path):
    with pytest.raises(SystemExit, match="is not a folder"):
        load_splits("cifar10", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="no Parquet file in or below"):
        load_splits("cifar10", tmp_path)
    write_cifar10(tmp_path / "data/first")
    write_cifar10(tmp_path / "data/second")
    with pytest.raises(SystemExit, match=r"name one of: .*first.*second"):
        load_splits("cifar10", tmp_path / "data")
