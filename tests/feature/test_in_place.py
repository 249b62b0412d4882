"""matching="in_place", where each deep node supervises the shallow one at its place; and pairs named by depth."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfr
from sfr.feature.pairs import resolve_pairs
from sfr.feature.term import feature_terms


def map_of(tokens: Tensor) -> Tensor:
    """Tokens (B, N, C) as the feature term takes them, channels first."""
    return tokens.transpose(1, 2)


def layersync(shallow: Tensor, deep: Tensor) -> Tensor:
    """The loss of LayerSync plus one: 1 - the cosine of the two features of each token, a mean over the tokens."""
    return 1 - F.cosine_similarity(shallow, deep.detach(), dim=-1).mean()


def test_in_place_with_the_cosine_is_layersync():
    shallow, deep = (torch.randn(5, 16, 24, requires_grad=True) for _ in range(2))
    found = feature_terms({"a": map_of(shallow), "b": map_of(deep)}, matching="in_place")["a <- b"].value
    expected = layersync(shallow, deep)
    torch.testing.assert_close(found, expected)
    ours, to_deep = torch.autograd.grad(found, [shallow, deep], allow_unused=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, shallow)[0])
    assert to_deep is None


@pytest.mark.parametrize("cost", ["cosine", "correlation", "sqeuclidean"])
@pytest.mark.parametrize("grouping", ["mean", "segments", "crop"])
def test_in_place_costs_what_the_identity_plan_costs(cost, grouping):
    shallow, deep = torch.randn(3, 8, 12, 12, requires_grad=True), torch.randn(3, 20, 5, 6)
    switches = {"cost": cost, "grouping": grouping}
    in_place = feature_terms({"a": shallow, "b": deep}, matching="in_place", **switches)["a <- b"]
    transport = feature_terms({"a": shallow, "b": deep}, **switches)["a <- b"]
    own = F.adaptive_avg_pool2d(shallow, 4).flatten(2).mT
    other = F.adaptive_avg_pool2d(deep, 4).flatten(2).mT
    groups = {"mean": [torch.stack([other[..., :8], other[..., 8:16]]).mean(dim=0)], "crop": [other[..., :8]]}
    if grouping != "crop":  # 20 channels are pooled to twice 8 first
        wide = F.adaptive_avg_pool1d(other, 16)
        halves = [wide[..., :8], wide[..., 8:]]
        groups = {"mean": [torch.stack(halves).mean(dim=0)], "segments": halves}
    expected = torch.stack([distance(own, each, cost) for each in groups[grouping]]).mean(dim=0)
    torch.testing.assert_close(in_place.values, expected, rtol=1e-4, atol=1e-5)
    assert (transport.values <= in_place.values + 1e-6).all()
    assert (transport.values < in_place.values - 1e-3).any()


def distance(shallow: Tensor, deep: Tensor, cost: str) -> Tensor:
    """The mean over the places of the ground cost of nodes (B, N, C), (B,)."""
    if cost == "sqeuclidean":
        return (shallow - deep).square().mean(dim=(1, 2))
    if cost == "correlation":
        shallow, deep = (each - each.mean(dim=2, keepdim=True) for each in (shallow, deep))
    return 1 - F.cosine_similarity(shallow, deep, dim=2).mean(dim=1)


def test_in_place_pools_both_maps_of_a_decoder_to_the_smaller():
    small, large = torch.randn(2, 6, 3, 2, requires_grad=True), torch.randn(2, 6, 12, 12)
    found = feature_terms({"a": small, "b": large}, matching="in_place")["a <- b"].values
    expected = distance(small.flatten(2).mT, F.adaptive_avg_pool2d(large, (3, 2)).flatten(2).mT, "cosine")
    torch.testing.assert_close(found, expected)


def test_in_place_leaves_an_image_out_that_is_not_finite():
    shallow, deep = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 6)
    deep[1, 0, 0] = torch.inf
    term = feature_terms({"a": shallow, "b": deep}, matching="in_place")["a <- b"]
    assert term.finite.tolist() == [True, False, True]
    assert term.values[1] == 0
    term.value.backward()
    assert shallow.grad.isfinite().all()


def test_maps_without_places_in_common_are_an_error():
    maps = {"conv": torch.randn(2, 8, 4, 4), "block": torch.randn(2, 8, 16)}
    with pytest.raises(ValueError, match=r"'conv' has 2 spatial axes and 'block' has 1.*\"transport\""):
        feature_terms(maps, matching="in_place")


@pytest.mark.parametrize("idle", [{"marginals": "cross"}, {"solver": "exact"}])
def test_what_belongs_to_the_transport_has_no_effect_in_place(idle):
    with pytest.raises(ValueError, match=f"matching='in_place'.*{next(iter(idle))}"):
        sfr.SFRConfig(matching="in_place", **idle)


def test_in_place_is_a_known_choice_and_survives_json():
    with pytest.raises(ValueError, match="matching must be"):
        sfr.SFRConfig(matching="nearest")
    config = sfr.SFRConfig(matching="in_place", pairs=[(0.3, 0.7)])
    assert sfr.SFRConfig.from_dict(config.to_dict()) == config


def test_pairs_by_depth_are_the_stages_that_lie_next_to_it():
    blocks = [f"blocks.{i}" for i in range(12)]  # the first one ends at a twelfth of the depth
    assert resolve_pairs([(0.3, 0.7)], blocks) == [(3, 7)]
    assert resolve_pairs([(0.3, 0.7), (0.25, 1.0)], blocks) == [(3, 7), (2, 11)]
    assert resolve_pairs([(0.3, 0.7)], ["a", "b", "c", "d"]) == [(0, 2)]
    assert resolve_pairs([(0.01, "c"), (0, 0.99)], ["a", "b", "c"]) == [(0, 2), (0, 2)]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0.5, 0.4)], "must come after"),
        ([(0.5, 0.6)], r"\(0.5, 0.6\) are both stage 'b'.*name more stages"),
        ([(0.0, 0.5)], r"must name depths above 0 and up to 1; got 0.0"),
        ([(0.5, 1.5)], r"must name depths above 0 and up to 1; got 1.5"),
        ([(0.5, float("nan"))], r"must name depths above 0 and up to 1; got nan"),
    ],
)
def test_bad_depths_are_an_error(pairs, message):
    with pytest.raises(ValueError, match=message):
        resolve_pairs(sfr.SFRConfig(pairs=pairs).pairs, ["a", "b", "c"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.feed = nn.LayerNorm(16), nn.Linear(9, 9), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x).mT).mT
        return x + F.gelu(self.feed(x))


class Velocity(nn.Module):
    """A network of tokens that predicts tokens, as one of flow matching does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(10))
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_two_lines_train_a_velocity_with_layersync():
    torch.manual_seed(0)
    plain, x, velocity = Velocity(), torch.randn(4, 9, 16), torch.randn(4, 9, 16)
    model = sfr.SFRWrapper(plain, stages=r"blocks\.\d+", layout="tokens")
    criterion = sfr.SFRLoss(model, label_loss=nn.MSELoss(), matching="in_place", pairs=[(0.3, 0.7)], feature_weight=0.5)
    loss = criterion(model(x), velocity)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    assert list(criterion.last.terms) == ["blocks.2 <- blocks.6"]

    model = model.unwrap()
    kept = {}
    for i in (2, 6):
        model.blocks[i].register_forward_hook(lambda _, __, output, i=i: kept.update({i: output}))
    expected = nn.MSELoss()(model(x), velocity) + 0.5 * layersync(kept[2], kept[6])
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, theirs)


def test_the_report_says_how_nodes_are_matched():
    model = sfr.SFRWrapper(Velocity(), stages=r"blocks\.\d+", layout="tokens")
    criterion = sfr.SFRLoss(model, label_loss=nn.MSELoss(), matching="in_place", pairs=[(0.3, 0.7)])
    shown = str(criterion.report(torch.randn(4, 9, 16), repeats=1))
    assert "in place" in shown
    assert "exact" not in shown


def test_the_plan_that_is_drawn_is_the_identity():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 9)
    )
    criterion = sfr.SFRLoss(sfr.SFRWrapper(net), matching="in_place")
    axes = sfr.plot.plan(criterion, torch.rand(2, 3, 16, 16))
    assert not axes.texts  # no arrow: each of the 16 patches supervises itself
    assert sum(line.get_marker() == "o" for line in axes.lines) == 16
