"""Every Python snippet of the README runs, in order, as a stranger would paste them."""

import re
from pathlib import Path

import torch
from torch.utils.data import TensorDataset
from torchvision import models

import sfr

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def surroundings():
    """What a user's loop has already."""
    model = models.resnet18(num_classes=10)
    x, y = torch.randn(4, 3, 64, 64), torch.randint(0, 10, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return {"model": model, "optimizer": optimizer, "loader": [(x, y)] * 2, "x": x, "y": y}


def test_the_readme_has_its_snippets():
    assert len(SNIPPETS) == 5


def test_the_two_lines_train_and_give_the_model_back():
    names = surroundings()
    plain = names["model"]
    before = plain.conv1.weight.detach().clone()
    exec(SNIPPETS[0], names)
    assert names["model"] is plain
    assert not torch.equal(plain.conv1.weight, before)


def test_the_other_snippets_run_on_a_wrapped_model(capsys):
    names = surroundings()
    exec(SNIPPETS[0].rsplit("model = ", 1)[0], names)
    exec(SNIPPETS[1], names)
    assert "supervised by" in capsys.readouterr().out
    exec(SNIPPETS[3], names)
    names["model"] = names["model"].unwrap()
    exec(SNIPPETS[2], names)
    assert names["model"].sfr.config.pairs == "last"


def test_the_snippet_of_past_predictions_remembers_every_image():
    names = surroundings() | {"sfr": sfr, "epochs": 3}
    names["data"] = TensorDataset(torch.randn(6, 3, 64, 64), torch.arange(6))
    exec(SNIPPETS[4], names)
    names["loss"].backward()
    assert (names["criterion"].labels.past.table.sum(dim=1) > 0).all()
    assert names["model"].sfr.config.alpha_steps == 3
