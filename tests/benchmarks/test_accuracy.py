import argparse
import json
import subprocess

import numpy as np
import pytest
import torch

from benchmarks.accuracy import corruptions, runner, training
from benchmarks.accuracy.cell import CELLS, Cell, Schedule
from benchmarks.accuracy.methods import known_arm
from benchmarks.accuracy.plans import PLANS, SCHEDULES
from benchmarks.accuracy.training import CellRun, judged, run_cell
from benchmarks.common import data
from benchmarks.common.data import Parts, load_parts
from benchmarks.common.images import Batches, resized
from benchmarks.common.labels import few_labels, with_noise
from examples.common.data import SOURCES, Labelled
from examples.common.learning_rate import warmup_then_cosine
from examples.common.metrics import ClassificationMetric

CPU = torch.device("cpu")
TINY = Schedule(epochs=3, batch_size=8, per_class=2, image_size=16)


def some_images(per_class, seed=0, classes=10):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(per_class)
    return Labelled(torch.randint(0, 256, (len(labels), 3, 32, 32), generator=generator, dtype=torch.uint8), labels)


def cached_images(folder, train, test, dataset="cifar10"):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save([tuple(train), tuple(test)], folder / f"{dataset}.pt")


def batches_of(pixels, dataset="cifar10", recipe="crop-flip", seed=0):
    return Batches(pixels, dataset, recipe, torch.Generator().manual_seed(seed))


def normalised(pixels, dataset="cifar10"):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (SOURCES[dataset].mean, SOURCES[dataset].std))
    return (pixels / 255 - mean) / std


def test_plain_batches_are_the_images_normalised_and_channels_last():
    pixels = some_images(1).pixels
    batch = batches_of(pixels).plain(torch.tensor([3, 0]))
    torch.testing.assert_close(batch, normalised(pixels[[3, 0]]))
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [32, 16])
def test_augmented_images_are_shifted_and_mirrored_by_at_most_an_eighth(size):
    pixels = resized(some_images(8).pixels, size)
    padding = size // 8
    batch = batches_of(pixels).augmented(torch.arange(len(pixels)))
    padded = torch.nn.functional.pad(pixels, (padding,) * 4)
    seen = set()
    for image, whole in zip(batch, padded, strict=True):
        windows = whole.unfold(1, size, 1).unfold(2, size, 1).permute(1, 2, 0, 3, 4)  # by the place of the upper left
        both = normalised(torch.stack([windows, windows.flip(-1)]))
        found = ((image - both).abs().amax(dim=(3, 4, 5)) < 1e-5).nonzero().tolist()
        assert len(found) == 1
        seen.add(tuple(found[0]))
    assert {flip for flip, *_ in seen} == {0, 1}
    assert {top for _, top, _ in seen} == {left for *_, left in seen} == set(range(2 * padding + 1))


def test_digits_are_not_mirrored():
    pixels = resized(some_images(3).pixels, 16)
    batch = batches_of(pixels, "digits").augmented(torch.zeros(50, dtype=torch.long))
    padded = normalised(torch.nn.functional.pad(pixels[0], (1,) * 4), "digits")
    windows = torch.stack([padded[:, top : top + 16, left : left + 16] for top in range(3) for left in range(3)])
    assert (torch.cdist(batch.flatten(1), windows.flatten(1)).min(dim=1).values < 1).all()


def test_autoaugment_and_cutout_change_the_images_and_blank_a_square_of_at_most_half_the_width():
    pixels = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)  # most policies leave white images alone
    torch.manual_seed(0)
    batches = batches_of(pixels, recipe="autoaugment-cutout")
    batches.padding, batches.pixels = 0, pixels.permute(0, 2, 3, 1).contiguous()
    blank = (batches.mean.round() - batches.mean) / batches.std
    holes = (batches.augmented(torch.arange(64)) - blank[:, None, None]).abs().amax(dim=1) < 1e-5
    rows, columns = holes.any(dim=2).sum(dim=1), holes.any(dim=1).sum(dim=1)
    assert rows.max() == columns.max() == 16
    assert (holes.sum(dim=(1, 2)) == rows * columns).all()
    assert batches.augmented(torch.arange(64)).shape == (64, 3, 32, 32)


def test_equally_seeded_batches_are_augmented_alike():
    pixels, order = some_images(2).pixels, torch.arange(20)
    first, second, other = (batches_of(pixels, seed=seed).augmented(order) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_smaller_images_are_means_of_blocks():
    pixels = some_images(1).pixels
    blocks = pixels.float().view(10, 3, 16, 2, 16, 2).mean(dim=(3, 5))
    assert torch.equal(resized(pixels, 16), blocks.round().byte())
    assert resized(pixels, 32) is pixels


def test_few_labels_are_as_many_of_each_class_and_differ_by_seed():
    labels = torch.arange(10).repeat(9)
    few, other = (few_labels(labels, 3, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert labels[few].bincount().tolist() == [3] * 10
    assert len(few.unique()) == 30
    assert not torch.equal(few, other)


def test_label_noise_replaces_exactly_its_share_by_all_other_classes():
    labels = torch.arange(10).repeat(100)
    noisy = with_noise(labels, 0.4, 10, torch.Generator().manual_seed(0))
    wrong = noisy != labels
    assert wrong.sum() == 400
    assert ((noisy - labels)[wrong] % 10).unique().tolist() == list(range(1, 10))
    assert noisy.min() >= 0
    assert noisy.max() < 10


def test_held_out_images_are_taken_from_the_training_images(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT", 10)
    train, test = some_images(10), some_images(2, seed=1)
    cached_images(tmp_path, train, test)
    choices = load_parts("cifar10", None, tmp_path, "held-out")
    assert [len(part.labels) for part in choices] == [90, 10]
    together = torch.cat([part.pixels for part in choices]).flatten(1)
    assert torch.equal(together.unique(dim=0), train.pixels.flatten(1).unique(dim=0))
    final = load_parts("cifar10", None, tmp_path, "test")
    assert torch.equal(final.train.pixels, train.pixels)
    assert torch.equal(final.judged.pixels, test.pixels)


def test_learning_rate_rises_for_a_twentieth_and_falls_to_zero():
    schedule = warmup_then_cosine(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0), 100)
    factors = [schedule.lr_lambdas[0](step) for step in range(101)]
    np.testing.assert_allclose(factors[:6], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[100] == pytest.approx(0)


def test_scores_are_those_of_the_examples_metric():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 10, generator=generator), torch.randint(0, 10, (200,), generator=generator)
    metric = ClassificationMetric(keep_in_memory=True)
    metric.add_batch(predictions=logits.tolist(), references=labels.tolist())
    expected = metric.compute()
    assert judged(logits, labels) == pytest.approx(expected, abs=1e-5)


def test_runs_of_one_seed_share_weights_images_and_wrong_labels_whatever_the_arm():
    parts = Parts(some_images(20), some_images(1, seed=1))
    schedule = Schedule(epochs=1, batch_size=8, per_class=2, image_size=16, label_noise=0.4)
    runs = [
        CellRun(Cell(arm, seed, "test", "tiny", "resnet8", "cifar10"), schedule, parts, CPU)
        for arm, seed in [("vanilla", 0), ("sfr@weight=0.2", 0), ("vanilla", 1)]
    ]
    first, same, other = ([run.train.pixels, run.train.labels, run.model.conv1.weight] for run in runs)
    assert all(torch.equal(left, right) for left, right in zip(first, same, strict=True))
    assert not any(torch.equal(left, right) for left, right in zip(first, other, strict=True))
    orders = [torch.randperm(20, generator=run.order) for run in runs]
    assert torch.equal(orders[0], orders[1])


def test_a_killed_cell_goes_on_to_the_same_result(tmp_path, monkeypatch):
    cached_images(tmp_path / "cache", some_images(20), some_images(3, seed=1))
    some = {name: corruptions.CORRUPTIONS[name] for name in ("gaussian_noise", "contrast")}
    monkeypatch.setattr(training, "CORRUPTIONS", some)
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    monkeypatch.setattr(training, "CORRUPTED_IMAGES", 20)
    task = Cell("sfr", 0, "test", "tiny", "resnet8", "cifar10")

    def run(results):
        run_cell(task, TINY, None, results, tmp_path / "cache", CPU)
        return json.loads((results / task.file).read_text())

    whole = run(tmp_path / "whole")
    train_epoch = CellRun.train_epoch

    def killed(self):
        if self.curve:
            raise KeyboardInterrupt
        train_epoch(self)

    monkeypatch.setattr(CellRun, "train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    assert not (tmp_path / "killed" / task.file).exists()
    monkeypatch.setattr(CellRun, "train_epoch", train_epoch)
    resumed = run(tmp_path / "killed")
    for part in ("result", "curve", "corrupted"):
        assert resumed[part] == whole[part]
    assert [file.name for file in (tmp_path / "killed").rglob("*") if file.is_file()] == [task.file.name]


def test_held_out_cells_are_not_judged_on_corrupted_images(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT", 20)
    cached_images(tmp_path, some_images(20), some_images(2, seed=1))
    task = Cell("vanilla", 0, "held-out", "tiny", "resnet8", "cifar10")
    run_cell(task, TINY, None, tmp_path, tmp_path, CPU)
    assert "corrupted" not in json.loads((tmp_path / task.file).read_text())


def test_cells_of_larger_photographs_are_not_judged_on_corruptions_made_for_cifar(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SMALL_SOURCES", {"cifar10": None})
    cached_images(tmp_path, some_images(20), some_images(2, seed=1))
    task = Cell("vanilla", 0, "test", "tiny", "resnet8", "cifar10")
    run_cell(task, TINY, None, tmp_path, tmp_path, CPU)
    assert "corrupted" not in json.loads((tmp_path / task.file).read_text())


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_a_corruption_grows_with_its_severity_and_repeats(name):
    smooth = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)), 32)
    pixels = corruptions.to_bytes(smooth)
    harm = [(corruptions.corrupted(pixels, name, s).int() - pixels).abs().float().mean() for s in (1, 3, 5)]
    assert 0 < harm[0] < harm[1] < harm[2]
    assert torch.equal(corruptions.corrupted(pixels, name, 3), corruptions.corrupted(pixels, name, 3))


def test_brightness_raises_the_value_of_each_pixel():
    pixels = torch.tensor([[100, 50, 0], [0, 0, 0], [255, 10, 10]], dtype=torch.uint8).view(3, 3, 1, 1)
    brighter = corruptions.corrupted(pixels, "brightness", 3).view(3, 3)
    shift = 0.15 * 255
    expected = [[100 + shift, (100 + shift) / 2, 0], [shift] * 3, [255, 10, 10]]
    np.testing.assert_allclose(brighter, expected, atol=0.51)


def run_main(monkeypatch, folder, *arguments):
    line = [
        "benchmarks.accuracy",
        "--results",
        str(folder / "results"),
        "--cache",
        str(folder / "cache"),
        "--device",
        "cpu",
    ]
    monkeypatch.setattr("sys.argv", [*line, *arguments])
    runner.main()


def test_the_runner_runs_missing_cells_only_and_names_those_that_failed(tmp_path, monkeypatch, capfd):
    cached_images(tmp_path / "cache", some_images(20), some_images(3, seed=1))
    common = ["--schedule", "smoke", "--dataset", "cifar10", "--seeds", "0", "--workers", "2", "--model"]
    run_main(monkeypatch, tmp_path, *common, "resnet8", "--arms", "vanilla")
    shown = capfd.readouterr().out
    assert "1 cells, 1 to run" in shown
    assert "images/s" in shown
    (file,) = (tmp_path / "results").rglob("*.json")
    record = json.loads(file.read_text())
    assert record["environment"]["threads"] == 1
    assert record["schedule"]["epochs"] == len(record["curve"]) == SCHEDULES["smoke"].epochs
    file.write_text("kept")
    monkeypatch.setattr(runner, "start_cell", lambda *_: subprocess.Popen(["false"]))
    with pytest.raises(SystemExit, match=r"1 cells failed: .*no_such_field"):
        run_main(monkeypatch, tmp_path, *common, "resnet8", "--arms", "vanilla", "sfr@no_such_field=1")
    assert "2 cells, 1 to run" in capfd.readouterr().out
    assert file.read_text() == "kept"


def test_the_remaining_time_counts_images_and_pixels():
    sizes = [runner.size(Cell("vanilla", 0, "test", name)) for name in ("tenth-16px", "tenth", "full-30")]
    assert sizes[1] == 4 * sizes[0]
    assert sizes[2] == 3 * sizes[1]


def test_unknown_arms_are_refused_before_anything_runs():
    with pytest.raises(argparse.ArgumentTypeError, match="no arm is called 'distill'"):
        known_arm("distill")


def test_every_committed_cell_is_one_of_a_plan():
    planned = {cell.file for rounds in PLANS.values() for round_ in rounds for cell in round_.cells()}
    committed = {file.relative_to(CELLS) for file in CELLS.glob("*/*.json")}
    assert committed
    assert not committed - planned
