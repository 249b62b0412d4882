"""Every Python snippet of the README and the guide runs, as a stranger would paste it; links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision import models

import sfr

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("C*.md"))]


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


README, GUIDE = snippets("README.md"), snippets("docs/guide.md")


def surroundings():
    """What a user's loop has already."""
    model = models.resnet18(num_classes=10)
    x, y = torch.randn(4, 3, 64, 64), torch.randint(0, 10, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    given = {"sfr": sfr, "torch": torch, "class_weights": torch.ones(10), "epochs": 3}
    data = TensorDataset(torch.randn(6, 3, 64, 64), torch.arange(6))
    return {"model": model, "optimizer": optimizer, "loader": [(x, y)] * 2, "x": x, "y": y, "data": data, **given}


def test_the_pages_have_their_snippets():
    assert (len(README), len(GUIDE)) == (2, 5)


def test_the_readme_has_at_most_a_thousand_words():
    words = [word for word in (ROOT / "README.md").read_text().split() if any(map(str.isalnum, word))]
    assert len(words) <= 1000


def test_the_two_lines_train_and_give_the_model_back():
    names = surroundings()
    plain = names["model"]
    before = plain.conv1.weight.detach().clone()
    exec(README[0], names)
    assert names["model"] is plain
    assert not torch.equal(plain.conv1.weight, before)


def test_the_report_is_printed_before_training(capsys):
    names = surroundings()
    exec(README[0].partition("for x, y")[0], names)
    exec(README[1], names)
    assert "supervised by" in capsys.readouterr().out


def test_the_guide_runs_from_top_to_bottom():
    names = surroundings()
    exec(GUIDE[0], names)
    assert names["model"].sfr.config.pairs == "last"
    names["criterion"](names["model"](names["x"]), names["y"]).backward()
    exec(GUIDE[1], names)
    names["criterion"](names["model"](names["x"]), names["y"]).backward()
    exec(GUIDE[2], names)
    exec(GUIDE[3], names)
    names["loss"].backward()
    assert (names["criterion"].labels.past.table.sum(dim=1) > 0).all()
    assert names["model"].sfr.config.alpha == sfr.Ramp(0, 0.8, steps=3)
    names["model"] = sfr.SFRWrapper(names["model"])
    exec(GUIDE[4], names)
    names["criterion"](names["model"](names["x"]), names["y"]).backward()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target
