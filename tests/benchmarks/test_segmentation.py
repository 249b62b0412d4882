"""The benchmark of dense targets: its data, its scores, and every line of it once."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks.segmentation import __main__ as command
from benchmarks.segmentation import cell as cells
from benchmarks.segmentation import page
from benchmarks.segmentation.cell import NUM_CLASSES, VOID, confusion, scores
from benchmarks.segmentation.data import SIZE, Scenes, augmented, load_scenes, normalised
from benchmarks.segmentation.networks import UNet, build_network
from sfr.model.outputs import the_logits


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Four scenes of each part: the left half is of one class and dark, the right half of another and light."""
    folder = tmp_path_factory.mktemp("camvid")
    random = np.random.default_rng(0)
    for part in ("train", "validation", "test"):
        rows = []
        for _ in range(4):
            classes = np.full((180, 240), 3, np.uint8)
            classes[:, 120:] = 7
            classes[:20] = VOID
            shade = np.where(classes == 3, 60, 200)[..., None] + random.integers(-20, 20, (180, 240, 3))
            rows.append({"image": png(shade.astype(np.uint8)), "annotation": png(classes)})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    """A cell of each arm in the smallest plan."""
    path = tmp_path_factory.mktemp("segmentation")
    with pytest.MonkeyPatch.context() as patch:
        arms = ["--arms", "vanilla", "sfr@feature_weight=2", "--seeds", "1", "--models", "unet"]
        run(
            patch, data_dir, "--plan", "tiny", *arms, "--results", str(path / "results"), "--cache", str(path / "cache")
        )
    return path


def run(monkeypatch, data_dir, *arguments):
    monkeypatch.setattr(sys, "argv", ["segmentation", "--data-dir", str(data_dir), *arguments])
    threads = torch.get_num_threads()
    command.main()
    torch.set_num_threads(threads)


def test_scenes_keep_their_classes(data_dir, tmp_path):
    scenes = load_scenes(data_dir, tmp_path, "train")
    again = load_scenes(data_dir / "nowhere", tmp_path, "train")  # by the decoded images alone
    assert scenes.pixels.shape == (4, 3, *SIZE)
    assert scenes.classes.unique().tolist() == [3, 7, VOID]
    assert torch.equal(scenes.classes, again.classes)
    dark = scenes.pixels.float().mean(dim=1)[scenes.classes == 3]
    assert dark.max() < 100


def test_a_window_shows_image_and_classes_of_the_same_place(data_dir, tmp_path):
    scenes = load_scenes(data_dir, tmp_path, "train")
    seen = [augmented(scenes, torch.Generator().manual_seed(seed)) for seed in range(8)]
    for each in seen:
        light = each.pixels.float().mean(dim=1) > 130
        known = each.classes != VOID
        assert (light == (each.classes == 7))[known].float().mean() > 0.97  # the edge itself is mixed
    mirrored = [bool(each.classes[0, -1, 0] == 7) for each in seen]
    assert True in mirrored
    assert False in mirrored
    assert not torch.equal(seen[0].pixels, seen[1].pixels)
    assert -2.1 < normalised(seen[0].pixels).min() < normalised(seen[0].pixels).max() < 2.1


def test_scores_are_those_of_sets_of_pixels():
    found, classes = torch.randint(0, NUM_CLASSES, (2, 2, 5, 6)).unbind()
    classes[0, 0] = VOID
    counts = confusion(found, classes)
    known = classes != VOID
    for of in range(NUM_CLASSES):
        both = ((found == of) & (classes == of) & known).sum()
        union = (((found == of) | (classes == of)) & known).sum()
        assert counts[of, of] == both
        assert counts[of].sum() + counts[:, of].sum() - counts[of, of] == union


def test_a_network_that_is_right_has_all_of_it():
    classes = torch.randint(0, 3, (2, 8, 8)).byte()

    class Right(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(classes.long(), NUM_CLASSES).movedim(3, 1).float()

    result = scores(Right(), Scenes(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), classes), cells.PLANS["tiny"])
    assert result["miou"] == result["pixel_accuracy"] == 1


@pytest.mark.parametrize("name", ["unet", "lraspp"])
def test_networks_give_every_pixel_a_class(name):
    network = build_network(name, NUM_CLASSES)
    assert the_logits(network(torch.randn(2, 3, *SIZE))).shape == (2, NUM_CLASSES, *SIZE)


def test_the_arms_share_all_but_the_method(folder):
    plain, ours = (
        json.loads((folder / f"results/tiny-test/unet-{arm}-seed1.json").read_text())
        for arm in ("vanilla", "sfr@feature_weight=2")
    )
    assert plain["recipe"] == ours["recipe"]
    assert plain["curve"] != ours["curve"]
    assert abs(plain["curve"][0] - ours["curve"][0]) < 2  # weight times the cosine, of the same beginning
    assert 0 <= plain["result"]["miou"] <= 1


def test_cells_that_are_there_are_not_run_again(folder, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_cell", None)
    arguments = ["--plan", "tiny", "--arms", "vanilla", "--seeds", "1", "--models", "unet"]
    run(monkeypatch, data_dir, *arguments, "--results", str(folder / "results"))
    assert "is there" in capsys.readouterr().out


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="arm must be"):
        cells.trained(UNet(NUM_CLASSES), cells.Cell("tiny", "unet", "ps-kd", 0), cells.PLANS["tiny"], None)


def test_the_page_pairs_the_arms_by_seed(folder, tmp_path, monkeypatch):
    results = tmp_path / "results"
    for arm, offset in (("vanilla", 0.0), ("sfr", 0.02)):
        record = json.loads((folder / "results/tiny-test/unet-vanilla-seed1.json").read_text())
        for seed in (1, 2):
            own = record | {"arm": arm, "seed": seed}
            own["result"] = record["result"] | {"miou": 0.4 + seed / 100 + offset}
            file = results / "tiny-test" / f"unet-{arm}-seed{seed}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(own))
    written = tmp_path / "segmentation.md"
    written.write_text(f"words\n\n{page.MARK}\n")
    monkeypatch.setattr(page, "CELLS", results)
    monkeypatch.setattr(page, "PAGE", written)
    page.write_page()
    assert "| `sfr` | 2 | 43.50 ± 0.71 | +2.00 ± 0.00 |" in written.read_text()
    assert written.read_text().startswith("words")
