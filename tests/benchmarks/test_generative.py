"""The benchmark of networks that draw: its scores, and every line of it once."""

import json
import sys

import pytest
import torch

from benchmarks.generative import __main__ as command
from benchmarks.generative import cell as cells
from benchmarks.generative import page, scores
from examples.common.data import Labelled
from examples.common.diffusion_transformer import DiffusionTransformer


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generative", *arguments])
    command.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One cell of the smallest plan."""
    path = tmp_path_factory.mktemp("generative")
    with pytest.MonkeyPatch.context() as patch:
        arms = ["--arms", "layersync", "--seeds", "3"]
        run(patch, "--plan", "tiny", *arms, "--results", str(path / "results"), "--cache", str(path / "cache"))
    return path


def test_a_cell_says_what_was_run_and_found(folder):
    cell = json.loads((folder / "results/tiny/layersync-seed3.json").read_text())
    assert cell["options"].startswith("--dataset=digits --image-size=8")
    assert "--seed=3" in cell["options"]
    assert len(cell["scores"]["probes"]) == cells.PLANS["tiny"].depth
    assert min(cell["scores"]["frechet"].values()) > 0
    assert cell["history"][-1]["test_loss"] == cell["scores"]["error"]
    assert cell["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_arms_differ_in_what_their_names_say():
    plan = cells.PLANS["cpu"]
    plain, faster, other = (plan.options(arm, 0) for arm in ("vanilla", "vanilla-1.5-lr", "transport"))
    assert set(faster) - set(plain) == {"--lr=0.0015"}
    assert set(other) - set(plain) == {"--sfr", "matching=transport"}


def test_a_cell_that_is_there_is_not_run_again(folder, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_cell", None)
    arguments = ["--plan", "tiny", "--arms", "layersync", "--seeds", "3", "--results", str(folder / "results")]
    run(monkeypatch, *arguments)
    assert "is there" in capsys.readouterr().out


def test_a_training_that_is_over_is_only_judged(folder):
    weights = folder / "cache/tiny/layersync-seed3/model.pt"
    written = weights.stat().st_mtime_ns
    again = cells.run_cell(cells.Cell("tiny", "layersync", 3), None, folder / "again", folder / "cache")
    before = json.loads((folder / "results/tiny/layersync-seed3.json").read_text())
    assert again["scores"] == before["scores"]
    assert weights.stat().st_mtime_ns == written


def test_the_page_pairs_the_seeds(folder, monkeypatch, tmp_path):
    (tmp_path / "generative.md").write_text(f"# By hand\n\n{page.MARK}\n")
    cell = json.loads((folder / "results/tiny/layersync-seed3.json").read_text())
    plain = cell | {"arm": "vanilla", "scores": cell["scores"] | {"error": cell["scores"]["error"] - 0.25}}
    (tmp_path / "results/tiny").mkdir(parents=True)
    faster = [plain | {"arm": f"{arm}-1.5-lr", "scores": plain["scores"]} for arm in ("vanilla", "layersync")]
    for record in (cell, plain, plain | {"seed": 4}, *faster):
        (tmp_path / f"results/tiny/{record['arm']}-seed{record['seed']}.json").write_text(json.dumps(record))
    for name, path in (("CELLS", "results"), ("DOCS", "."), ("PAGE", "generative.md")):
        monkeypatch.setattr(page, name, tmp_path / path)
    page.write_page()
    text = (tmp_path / "generative.md").read_text()
    assert text.startswith("# By hand")
    assert "| `layersync` | `vanilla` | 1 | +250.00 |" in text
    assert "| `vanilla-1.5-lr` | `vanilla` | 1 | +0.00 |" in text
    assert "| `layersync-1.5-lr` | `vanilla-1.5-lr` | 1 | +0.00 |" in text
    assert "| `vanilla` | 2 |" in text
    assert (tmp_path / "generative-tiny.png").read_bytes().startswith(b"\x89PNG")


def test_the_distance_is_zero_for_the_same_images_and_grows_with_noise():
    torch.manual_seed(0)
    real = torch.nn.functional.interpolate(torch.rand(400, 3, 4, 4), 16, mode="bilinear") * 2 - 1
    others = {f"{noise}": real + noise * torch.randn_like(real) for noise in (0, 0.1, 0.4)}
    found = scores.frechet_distances(real, others, torch.device("cpu"))
    assert found["0"] == pytest.approx(0, abs=1e-3)
    assert 1 < 2 * found["0.1"] < found["0.4"]


def test_a_probe_reads_what_a_block_holds():
    """A network whose blocks are the identity holds the images: classes that differ in brightness can be told."""
    torch.manual_seed(0)
    network = DiffusionTransformer(8, patch=4, width=16, depth=2, heads=2, num_classes=2).eval()
    labels = torch.arange(200) % 2
    images = 0.3 * torch.randn(200, 3, 8, 8) + 0.8 * (2 * labels[:, None, None, None] - 1)
    part = Labelled(images, labels)
    assert min(scores.probes(network, part, part, 2)) > 0.95
    shuffled = Labelled(images, labels[torch.randperm(200)])
    assert max(scores.probes(network, part, shuffled, 2)) < 0.7
