"""Of stages that the model finds itself only those on one path through it supervise each other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sfr


class Towers(nn.Module):
    """Two towers, whose outputs meet in the scores."""

    def __init__(self):
        super().__init__()
        self.user, self.item = (nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 8)) for width in (5, 6))

    def forward(self, user, item):
        return self.user(user) @ self.item(item).T


class Autoencoder(nn.Module):
    """Mean and logarithm of the variance come from one encoding."""

    def __init__(self):
        super().__init__()
        self.encoder, self.mean, self.variance = nn.Linear(5, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.decoder, self.last = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.encoder(x).relu()
        mean, variance = self.mean(x), self.variance(x)
        return self.last(self.decoder(mean + variance.exp()).relu())


BRANCHES = {
    "towers": (Towers, 2, {"user.1 <- user", "item.1 <- item"}),
    "autoencoder": (
        Autoencoder,
        1,
        {"encoder <- mean", "encoder <- variance", "encoder <- decoder", "mean <- decoder", "variance <- decoder"},
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_an_example_input_gives_the_pairs_of_the_first_training_forward(name):
    build, inputs, expected = BRANCHES[name]
    x = [torch.randn(4, width) for width in (5, 6)[:inputs]]
    model = sfr.SFRWrapper(build(), example_input=tuple(x))
    criterion = sfr.SFRLoss(model, label_loss=lambda output, _: output.square().mean())
    criterion(model(*x), None).backward()
    assert set(criterion.last.pairs) == expected


@pytest.mark.parametrize("name", BRANCHES)
def test_stages_on_different_branches_do_not_supervise_each_other_unless_they_are_named(name):
    build, inputs, expected = BRANCHES[name]
    x = [torch.randn(4, width) for width in (5, 6)[:inputs]]
    model = sfr.SFRWrapper(build())
    criterion = sfr.SFRLoss(model, label_loss=lambda output, _: output.square().mean())
    for _ in range(2):
        criterion(model(*x), None).backward()
    assert set(criterion.last.pairs) == expected
    assert "left out: pairs of stages on different branches" in str(criterion.report(*x, repeats=1))
    twin = copy.deepcopy(model)
    criterion = sfr.SFRLoss(twin, label_loss=lambda output, _: output.square().mean())
    criterion(twin(*x), None).backward()
    assert set(criterion.last.pairs) == expected
    stages = model.sfr.stage_names
    model = sfr.SFRWrapper(model.unwrap(), stages=list(stages))
    criterion = sfr.SFRLoss(model, label_loss=lambda output, _: output.square().mean())
    criterion(model(*x), None).backward()
    assert len(criterion.last.pairs) == len(stages) * (len(stages) - 1) // 2


class Parts(nn.Module):
    """No gradient passes from one part to the next."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        first = self.first(x).relu()
        return self.head(self.second(first.detach()).relu() + first)


class Additive(nn.Module):
    """A small network for each feature, whose logits are added."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(5))

    def forward(self, x):
        return sum(part(x[:, i : i + 1]) for i, part in enumerate(self.parts))


@pytest.mark.parametrize("build", [Parts, Additive])
def test_if_no_two_stages_are_on_one_path_they_have_to_be_named(build):
    model = sfr.SFRWrapper(build())
    with pytest.raises(ValueError, match=r"none of .* was computed from another, as far as the gradient goes"):
        model(torch.randn(4, 5))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:2]
    model = sfr.SFRWrapper(build(), stages=names)
    criterion = sfr.SFRLoss(model)
    criterion(model(torch.randn(4, 5)), torch.arange(4) % 3).backward()
    assert list(criterion.last.pairs) == [f"{names[0]} <- {names[1]}"]


class Member(nn.Module):
    """A network of three resolutions, with its classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.third(x).relu().mean((2, 3)))


class Ensemble(nn.Module):
    """Members side by side, whose logits are averaged."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return torch.stack([member(x) for member in self.members]).mean(0)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_members_of_an_ensemble_do_not_supervise_each_other(count):
    model = sfr.SFRWrapper(Ensemble(Member() for _ in range(count)))
    criterion = sfr.SFRLoss(model)
    criterion(model(torch.randn(4, 3, 16, 16)), torch.arange(4) % 3).backward()
    last = f"members.{count - 1}"
    assert model.sfr.stage_names == tuple(f"{last}.{name}" for name in ("first", "second", "third"))


@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize("kind", [list, tuple])
def test_early_exits_do_not_hide_the_stages_behind_them(kind, skipped):
    class EarlyExits(Member):
        def __init__(self):
            super().__init__()
            self.exits = nn.ModuleList([nn.Linear(4, 3), nn.Linear(8, 3)])

        def forward(self, x):
            first = self.first(x).relu()
            second = self.second(first).relu()
            maps = [first, second, self.third(second).relu()]
            heads = [*self.exits, self.head]
            return kind(head(each.mean((2, 3))) for head, each in list(zip(heads, maps, strict=True))[skipped:])

    model = sfr.SFRWrapper(EarlyExits())
    criterion = sfr.SFRLoss(
        model, label_loss=lambda exits, target: sum(F.cross_entropy(each, target) for each in exits)
    )
    criterion(model(torch.randn(4, 3, 16, 16)), torch.arange(4) % 3).backward()
    assert list(criterion.last.pairs) == ["first <- second", "first <- third", "second <- third"]
