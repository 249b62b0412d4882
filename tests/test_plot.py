"""sfr.plot draws the plan of a pair over an image, leaves the model as it was, and says what cannot be drawn."""

import sys

import matplotlib as mpl
import pytest
import torch
from torch import nn

import sfr
from sfr.feature.emd import emd_l2, transport_plan

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


class Shifted(nn.Module):
    """Two stages: the deep map is the shallow one, rolled by one cell of the grid of 4 x 4 to the right."""

    def __init__(self):
        super().__init__()
        self.shallow, self.deep = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 5)
        for layer in (self.shallow, self.deep):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        deep = self.deep(self.shallow(x).roll(4, dims=3))
        return self.head(deep.mean(dim=(2, 3)))


def criterion_of(net):
    return sfr.SFRLoss(sfr.SFRWrapper(net, stages=["shallow", "deep"]))


def arrows(axes):
    """The arrows of a picture, as (from, to) in cells of 4 pixels, (row, column)."""
    return {
        tuple(tuple(int(each) // 4 for each in reversed(point)) for point in (note.xyann, note.xy))
        for note in axes.texts
    }


@pytest.mark.parametrize("cost", ["cosine", "correlation", "sqeuclidean"])
@pytest.mark.parametrize("marginals", ["uniform", "cross"])
def test_the_plan_is_that_of_the_loss(cost, marginals):
    shallow, deep = torch.rand(2, 6, 8), torch.rand(2, 9, 8)
    plan = transport_plan(shallow, deep, cost=cost, marginals=marginals)
    torch.testing.assert_close(plan.sum(dim=(1, 2)), torch.ones(2))
    if cost == "sqeuclidean":
        costs = (shallow[:, :, None] - deep[:, None]).square().mean(dim=3)
    else:
        centred = [side - side.mean(dim=2, keepdim=True) if cost == "correlation" else side for side in (shallow, deep)]
        costs = 1 - torch.cosine_similarity(centred[0][:, :, None], centred[1][:, None], dim=3)
    value = emd_l2(shallow, deep, cost=cost, marginals=marginals, reduction="none")
    torch.testing.assert_close((plan * costs).sum(dim=(1, 2)), value, rtol=1e-4, atol=1e-6)


def test_each_patch_gets_an_arrow_from_the_patch_that_supervises_it():
    images = torch.rand(2, 3, 4, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    axes = sfr.plot.plan(criterion_of(Shifted()), images, sample=1)
    right = {((row, (column + 1) % 4), (row, column)) for row in range(4) for column in range(4)}
    assert arrows(axes) == right
    assert axes.get_title() == "shallow <- deep"


def test_a_patch_that_supervises_itself_gets_a_dot():
    class InPlace(Shifted):
        def forward(self, x):
            return self.head(self.deep(self.shallow(x)).mean(dim=(2, 3)))

    axes = sfr.plot.plan(criterion_of(InPlace()), torch.rand(1, 3, 16, 16))
    assert not axes.texts
    assert sum(line.get_marker() == "o" for line in axes.lines) == 16


def test_with_a_supervisor_its_deep_map_is_drawn_and_it_is_left_as_it_was():
    class Still(Shifted):
        """Its deep map is the shallow one, and a normalisation counts its batches."""

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            self.norm(x)
            return self.head(self.deep(self.shallow(x)).mean(dim=(2, 3)))

    supervisor = Still()
    model = sfr.SFRWrapper(Shifted(), stages=["shallow", "deep"])
    axes = sfr.plot.plan(sfr.SFRLoss(model, supervisor=supervisor), torch.rand(2, 3, 16, 16))
    assert axes.get_title() == "shallow <- deep of the supervisor"
    assert not arrows(axes)
    assert supervisor.norm.num_batches_tracked == 0
    assert supervisor.training
    assert arrows(sfr.plot.plan(criterion_of(Shifted()), torch.rand(2, 3, 16, 16)))


def test_the_figure_can_be_saved(make_net, tmp_path):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()))
    axes = sfr.plot.plan(criterion, torch.rand(2, 3, 16, 16), ("1", "5"))
    axes.figure.savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_it_draws_on_the_axes_it_is_given(make_net):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert sfr.plot.plan(sfr.SFRLoss(sfr.SFRWrapper(make_net())), torch.rand(2, 3, 16, 16), axes=axes) is axes


def test_segments_and_grayscale_images_are_drawn():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 16, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    criterion = sfr.SFRLoss(sfr.SFRWrapper(net), grouping="segments")
    axes = sfr.plot.plan(criterion, torch.rand(3, 1, 16, 16), sample=-1)
    assert axes.images[0].get_array().ndim == 2


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Dropout(),
        nn.Conv2d(8, 9, 3, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    criterion = sfr.SFRLoss(sfr.SFRWrapper(net))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = torch.rand(2, 3, 16, 16)
    random = torch.get_rng_state()
    sfr.plot.plan(criterion, images)
    assert not net.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert criterion.step == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(3, 16, 16)}, r"images must be a batch of shape \(B, C, H, W\); got \(3, 16, 16\)"),
        ({"sample": 2}, "sample must be the number of one of the 2 images; got 2"),
        ({"pair": ("1", "7")}, "there is no stage '7'"),
        ({"images": torch.full((2, 3, 16, 16), torch.nan)}, "image 0 has features that are not finite"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(make_net, change, message):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()))
    with pytest.raises(ValueError, match=message):
        sfr.plot.plan(**({"criterion": criterion, "images": torch.rand(2, 3, 16, 16)} | change))


def test_a_model_instead_of_its_criterion_is_an_error(make_net):
    with pytest.raises(TypeError, match=r"criterion must be an sfr\.SFRLoss; got Sequential"):
        sfr.plot.plan(sfr.SFRWrapper(make_net()), torch.rand(2, 3, 16, 16))


def test_a_stage_without_two_spatial_axes_is_an_error_that_names_it():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Conv1d(8, 8, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    criterion = sfr.SFRLoss(sfr.SFRWrapper(net, stages=["0", "2"]))
    with pytest.raises(ValueError, match="stage '2' is no map with two spatial axes"):
        sfr.plot.plan(criterion, torch.rand(2, 3, 16, 16))


def test_without_matplotlib_the_error_says_what_to_install(make_net, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="draws with matplotlib, which is not installed: pip install matplotlib"):
        sfr.plot.plan(sfr.SFRLoss(sfr.SFRWrapper(make_net())), torch.rand(2, 3, 16, 16))
