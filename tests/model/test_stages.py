"""Stages are found in any model, and named stages are checked; test_models.py has the kinds of model."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision import models

import sfr
from sfr.feature.pairs import resolve_pairs
from sfr.model.choose import STAGES_IN_DEPTH
from sfr.model.formats import View
from sfr.model.layouts import infer_layout
from sfr.model.reading import assumed_view
from sfr.model.settings import StageSettings

TORCHVISION_STAGES = {
    "resnet18": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "resnet50": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "vgg11_bn": ("features.2", "features.6", "features.13", "features.20", "features.27"),
    "densenet121": ("features.relu0", *(f"features.denseblock{k}" for k in (1, 2, 3)), "features"),
    "mobilenet_v2": ("features.1", "features.3", "features.6", "features.13", "features"),
    "mobilenet_v3_small": ("features.0", "features.1", "features.3", "features.8", "features"),
    "efficientnet_b0": ("features.1", "features.2", "features.3", "features.5", "features"),
    "convnext_tiny": ("features.1", "features.3", "features.5", "features"),
}


@pytest.mark.parametrize("name", TORCHVISION_STAGES)
def test_the_last_block_at_each_resolution_is_a_stage(name):
    model = sfr.SFRWrapper(getattr(models, name)(num_classes=4), example_input=torch.zeros(1, 3, 64, 64))
    assert model.sfr.stage_names == TORCHVISION_STAGES[name]


def test_the_first_training_forward_discovers_the_stages_of_an_example_input(make_net, batch):
    plain = make_net()
    from_example = sfr.SFRWrapper(plain, example_input=batch[0])
    names = from_example.sfr.stage_names
    lazy = sfr.SFRWrapper(from_example.unwrap())
    assert lazy.sfr.stage_names is None
    lazy(batch[0])
    assert lazy.sfr.stage_names == names == ("1", "3", "5")


def test_a_backbone_inside_a_larger_model_is_looked_into():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = models.resnet18()

        def forward(self, image):
            return self.backbone(image)

    model = sfr.SFRWrapper(Net(), example_input=torch.zeros(1, 3, 64, 64))
    assert model.sfr.stage_names == tuple(f"backbone.{name}" for name in TORCHVISION_STAGES["resnet18"])


def test_three_dimensional_convolutions_have_stages_too():
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 8, 3, 2, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    model = sfr.SFRWrapper(net)
    logits = model(torch.randn(2, 1, 8, 8, 8))
    sfr.SFRLoss(model)(logits, torch.tensor([0, 1])).backward()
    assert model.sfr.stage_names == ("0", "1")


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 10)), id="none"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), id="one"),
    ],
)
def test_a_model_with_less_than_two_stages_is_an_error_that_says_what_to_do(net):
    with pytest.raises(ValueError, match=r"found \d stage\(s\).*stages=\["):
        sfr.SFRWrapper(net, example_input=torch.zeros(2, 3, 16, 16))
    model = sfr.SFRWrapper(net)
    with pytest.raises(ValueError, match="two are needed"):
        model(torch.zeros(2, 3, 16, 16))
    assert not any(module._forward_hooks for module in net.modules())


def test_a_model_whose_stages_cannot_be_found_works_with_those_named(batch):
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 10))
    with pytest.raises(ValueError, match=r"two are needed.*stages=\["):
        sfr.SFRWrapper(net, example_input=batch[0])
    model = sfr.SFRWrapper(net, stages=["1", "2"])
    train(model, batch[0])
    assert model.sfr.stage_views == {"1": View("vector"), "2": View("vector")}


def test_a_layout_that_cannot_be_told_can_be_stated(batch):
    """The channels are as many as the rows, and no layer tells which axis is theirs."""
    net = Classifier(nn.Conv2d(3, 16, 3, padding=1), Part(lambda x: x.permute(0, 2, 3, 1)), width=16)
    for layout, expected in (("auto", "channels_first"), ("channels_last", "channels_last")):
        model = sfr.SFRWrapper(net, stages=["body.0", "body.1"], layout=layout)
        train(model, batch[0])
        assert model.sfr.stage_views["body.1"] == View(expected)
        model.unwrap()


def test_stages_can_be_named(make_net):
    assert sfr.SFRWrapper(make_net(), stages=["0", "4"]).sfr.stage_names == ("0", "4")


def test_stages_can_be_a_regular_expression():
    model = sfr.SFRWrapper(models.resnet18(), stages=r"layer[124]")
    assert model.sfr.stage_names == ("layer1", "layer2", "layer4")


def test_an_unknown_stage_is_an_error_that_lists_near_names():
    with pytest.raises(ValueError, match=r"no stage 'layer5'; near names: .*layer4"):
        sfr.SFRWrapper(models.resnet18(), stages=["layer1", "layer5"])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["layer1", "layer1"], "repeated"),
        (["layer1"], "two are needed"),
        ("nothing.*", "gives 0 stage"),
        ("layer[", "is not a regular expression"),
    ],
)
def test_bad_stages_are_an_error(stages, message):
    with pytest.raises(ValueError, match=message):
        sfr.SFRWrapper(models.resnet18(), stages=stages)


def test_pairs_are_all_last_adjacent_or_given():
    names = ["a", "b", "c"]
    assert resolve_pairs("all", names) == [(0, 1), (0, 2), (1, 2)]
    assert resolve_pairs("last", names) == [(0, 2), (1, 2)]
    assert resolve_pairs("adjacent", names) == [(0, 1), (1, 2)]
    assert resolve_pairs([("a", "c"), (0, -2)], names) == [(0, 2), (0, 1)]


@pytest.mark.parametrize(
    ("pair", "message"), [(("a", "x"), "no stage 'x'"), ((0, 3), "out of range"), (("b", "a"), "must come after")]
)
def test_a_bad_pair_is_an_error(pair, message):
    with pytest.raises(ValueError, match=message):
        resolve_pairs([pair], ["a", "b", "c"])


class Dense(nn.Module):
    """Joins what came in with what a convolution makes of it."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        return torch.cat([x, self.convolution(x)], dim=1)


@pytest.mark.parametrize(
    ("stage", "shape", "layout"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(3, 8)), (2, 4, 4, 8), "channels_last"),
        (nn.Sequential(nn.Linear(3, 8), nn.Conv1d(8, 8, 1)), (2, 4, 8), "tokens"),
        (nn.Sequential(nn.LayerNorm(8), nn.Conv2d(3, 8, 1)), (2, 8, 4, 8), "channels_first"),
        (nn.Conv2d(3, 8, 1), (2, 8, 4, 4), "channels_first"),
        (Dense(nn.Conv2d(16, 8, 1)), (2, 24, 8, 8), "channels_first"),
        (nn.ReLU(), (2, 8, 4, 4), "channels_first"),
        (nn.Conv1d(3, 8, 1), (2, 8, 4), "channels_first"),
        (nn.Linear(3, 8), (2, 4, 8), "tokens"),
        (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), (2, 4, 4, 8), "channels_last"),
        (nn.Linear(3, 8), (2, 8), "vector"),
    ],
)
def test_the_layout_follows_from_axes_and_kind(stage, shape, layout):
    assert infer_layout(stage, torch.zeros(shape)) == layout


CONVOLUTIONS = {1: (nn.Conv1d, nn.MaxPool1d), 2: (nn.Conv2d, nn.MaxPool2d), 3: (nn.Conv3d, nn.MaxPool3d)}


@pytest.mark.parametrize("axes", CONVOLUTIONS)
def test_joined_maps_have_channels_first_though_they_are_as_wide_as_the_convolution_is(axes):
    convolution, pool = CONVOLUTIONS[axes]
    net = nn.Sequential(
        Dense(convolution(3, 8, 3, padding=1)),
        pool(2),
        Dense(convolution(11, 8, 3, padding=1)),
        pool(2),
        nn.Flatten(),
        nn.Linear(19 * 4**axes, 5),
    )
    model = sfr.SFRWrapper(net, example_input=torch.randn(2, 3, *[16] * axes))
    views = model._sfr.views
    assert {"0", "2"} <= set(views)
    assert {view.layout for view in views.values()} == {"channels_first"}


def test_an_attention_over_channels_by_a_convolution_changes_no_layout():
    """Efficient channel attention: a convolution that runs over the channels, inside blocks of convolutions."""

    class Block(nn.Module):
        def __init__(self, channels, width):
            super().__init__()
            self.convolution = nn.Conv1d(channels, width, 3, 2, 1)
            self.attention = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x):
            x = self.convolution(x)
            return (x * self.attention(x.mean(dim=2)[:, None]).sigmoid().transpose(1, 2)).relu()

    net = nn.Sequential(
        Block(3, 8), Block(8, 12), Block(12, 16), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 5)
    )
    model = sfr.SFRWrapper(net, example_input=torch.randn(4, 3, 64))
    assert {name: view.layout for name, view in model._sfr.views.items()} == dict.fromkeys("012", "channels_first")


def test_a_convolution_whose_channels_were_put_last_has_them_last():
    class Last(nn.Module):
        def __init__(self, channels, width):
            super().__init__()
            self.convolution = nn.Conv2d(channels, width, 3, 2, 1)

        def forward(self, x):
            return self.convolution(x.movedim(3, 1)).movedim(1, 3)

    net = nn.Sequential(Last(3, 6), Last(6, 12), nn.Flatten(), nn.Linear(4 * 4 * 12, 5))
    model = sfr.SFRWrapper(net, stages=["0", "1"], example_input=torch.randn(2, 16, 16, 3))
    assert {view.layout for view in model._sfr.views.values()} == {"channels_last"}


@pytest.mark.parametrize("width", [16, 12])
def test_a_convolution_shows_the_batch_where_the_logits_begin_with_the_time(width):
    """As in speech or text recognition: convolutions, recurrent layers, logits (T, B, K), here of 16 time steps."""

    class Recogniser(nn.Module):
        def __init__(self):
            super().__init__()
            first, second = nn.Conv1d(5, width, 3, 2, 1), nn.Conv1d(width, width, 3, 1, 1)
            self.convolutions = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
            self.recurrent = nn.GRU(width, 9)
            self.head = nn.Linear(9, 7)

        def forward(self, x):
            return self.head(self.recurrent(self.convolutions(x).permute(2, 0, 1))[0]).log_softmax(-1)

    model = sfr.SFRWrapper(Recogniser(), example_input=torch.randn(4, 5, 32))
    layouts = {name: view.layout for name, view in model._sfr.views.items()}
    assert layouts.pop("recurrent") == "sequence_first"
    assert set(layouts.values()) == {"channels_first"}


def test_a_stage_of_unknown_layout_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return x[:, :, :, :, None, None]

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Odd(), nn.Flatten(), nn.Linear(4 * 16, 3))
    model = sfr.SFRWrapper(net, stages=["0", "1"])
    with pytest.raises(ValueError, match=r"stage '1' has shape .*layout"):
        sfr.SFRLoss(model)(model(torch.zeros(2, 3, 4, 4)), torch.tensor([0, 1]))


def test_a_stage_without_layers_has_the_layout_of_the_layer_before_it():
    feature = torch.zeros(2, 8, 16)
    assert infer_layout(nn.ReLU(), feature, nn.Conv1d(3, 8, 1)) == "channels_first"
    assert infer_layout(nn.ReLU(), feature, nn.Linear(3, 16)) == "tokens"


def train(model, x, **switches):
    """Return the loss of one step of a model of ten classes, and its criterion."""
    criterion = sfr.SFRLoss(model, **switches)
    loss = criterion(model(x), torch.arange(len(x)) % 10)
    loss.backward()
    return loss, criterion


class Classifier(nn.Module):
    """Any body, pooled to as many channels as its output has, and a classifier."""

    def __init__(self, *body, width=8):
        super().__init__()
        self.body, self.fc = nn.Sequential(*body), nn.Linear(width, 10)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class Part(nn.Module):
    """Any function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Quantised(nn.Module):
    """Codes, whole numbers and a mask beside the features."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 10)
        self.codes, self.mask = Part(lambda x: (x * 10).long()), Part(lambda x: x > 0)

    def forward(self, x):
        x = self.conv1(x)
        x = x * self.mask(x) + self.codes(x) / 10
        return self.fc(self.conv2(x).mean((2, 3)))


def test_integer_and_boolean_outputs_are_no_stages(batch):
    model = sfr.SFRWrapper(Quantised())
    train(model, batch[0])
    assert model.sfr.stage_names == ("conv1", "conv2")


def test_stages_hold_for_images_of_other_sizes():
    model = sfr.SFRWrapper(models.resnet18(num_classes=10))
    for size in ((64, 64), (96, 64), (128, 160)):
        loss, _ = train(model, torch.randn(2, 3, *size))
        assert loss.isfinite()
    assert model.sfr.stage_names == TORCHVISION_STAGES["resnet18"]


def test_tokens_of_images_of_other_sizes_lose_the_same_prefix():
    vit = VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=10, dynamic_img_size=True)
    model = sfr.SFRWrapper(vit, example_input=torch.zeros(1, 3, 32, 32))
    assert model.sfr.stage_views["blocks.1"] == View("tokens", 1, (4, 4))
    for size, nodes in ((32, 16), (24, 9), (48, 16)):
        report = model.report(torch.randn(2, 3, size, size), repeats=1)
        assert report.pairs[0].nodes == (nodes, nodes)
        assert report.stages[0].dropped == 1


def test_a_module_called_more_than_once_is_not_discovered(batch):
    shared, last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
    first = nn.Conv2d(3, 8, 3, 2, 1)
    model = sfr.SFRWrapper(Classifier(first, shared, shared, last))
    train(model, batch[0])
    assert model.sfr.stage_names == ("body.0", "body")


def test_a_shared_module_named_by_its_second_name_is_an_error_that_names_the_first():
    shared = nn.Conv2d(8, 8, 3, padding=1)
    with pytest.raises(ValueError, match=r"stage 'body.2' is the same module as 'body.1'"):
        sfr.SFRWrapper(Classifier(nn.Conv2d(3, 8, 3), shared, shared), stages=["body.0", "body.2"])


def test_a_stage_that_later_layers_change_in_place_is_recorded_as_changed(batch):
    """As after batch normalisation: the feature is what the next layer gets, with the gradient of that."""
    results = []
    for inplace in (True, False):
        torch.manual_seed(0)
        body = nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 3, 2), nn.ReLU(inplace)
        # Out of place, the stage with the same values is the activation.
        model = sfr.SFRWrapper(Classifier(*body), stages=[f"body.{0 if inplace else 1}", "body.3"])
        loss, _ = train(model, batch[0], feature_weight=1.0)
        results.append((loss, [parameter.grad for parameter in model.parameters()]))
    (changed, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(changed, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_branches_that_do_not_lead_to_the_logits_are_no_stages(batch):
    class Branched(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk1, self.trunk2, self.fc = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 10)
            self.branch = nn.Conv2d(8, 8, 3, 4, 1)

        def forward(self, x):
            x = self.trunk1(x)
            side, x = self.branch(x), self.trunk2(x)
            return self.fc(x.mean((2, 3))), side

    model = sfr.SFRWrapper(Branched())
    sfr.SFRLoss(model)(model(batch[0])[0], batch[1]).backward()
    assert model.sfr.stage_names == ("trunk1", "trunk2")


@pytest.mark.parametrize("number", [lambda z: z.squeeze(1), lambda z: z.square().mean()], ids=["each image", "loss"])
def test_the_prediction_of_a_model_that_returns_a_number_is_no_stage(batch, number):
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            hidden = [layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.ReLU())]
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16), nn.ReLU(), *hidden, nn.Linear(16, 1))

        def forward(self, x):
            return number(self.net(x))

    model = sfr.SFRWrapper(Regression())
    model(batch[0])
    assert model.sfr.stage_names == ("net.2", "net.4", "net.6", "net.8")


def test_attention_maps_and_pooled_maps_inside_a_block_are_no_stages(batch):
    class Block(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, stride, 1)
            self.mixed_heads, self.pooled = nn.Conv2d(1, 1, 1), nn.Conv2d(8, 8, 3, 3, 1)

        def forward(self, x):
            x = self.conv(x)
            rows = x.flatten(2).transpose(1, 2)
            attention = self.mixed_heads((rows @ rows.transpose(1, 2))[:, None])[:, 0].softmax(dim=2)
            return (attention @ rows).transpose(1, 2).reshape(x.shape) + self.pooled(x).mean((2, 3), keepdim=True)

    model = sfr.SFRWrapper(Classifier(nn.Conv2d(3, 8, 3, padding=1), Block(2), Block(2)))
    train(model, batch[0])
    assert model.sfr.stage_names == ("body.0", "body.1", "body")


def test_resolutions_that_differ_by_a_border_are_one_level(batch):
    model = sfr.SFRWrapper(Classifier(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, 2)))
    train(model, batch[0])
    assert model.sfr.stage_names == ("body.1", "body")


class Block(nn.Module):
    """Residual, around any layer; optionally with its input as a second output."""

    def __init__(self, layer, twofold=False):
        super().__init__()
        self.layer, self.twofold = layer, twofold

    def forward(self, x):
        y = x + self.layer(x)
        return (y, x) if self.twofold else y


def test_a_few_equal_blocks_do_not_hide_the_other_resolutions(batch):
    def conv(stride):
        return nn.Conv2d(8, 8, 3, stride, 1)

    body = nn.Conv2d(3, 8, 3, 1, 1), conv(1), conv(2), Block(conv(1)), Block(conv(1)), conv(2), conv(1)
    model = sfr.SFRWrapper(Classifier(*body))
    train(model, batch[0])
    assert model.sfr.stage_names == ("body.1", "body.4", "body")


def test_of_blocks_inside_one_another_the_outer_ones_are_stages(batch):
    def block():
        return Block(Block(nn.Linear(32, 32)))

    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 32), block(), block(), nn.Linear(32, 10))
    model = sfr.SFRWrapper(net)
    train(model, batch[0])
    assert model.sfr.stage_names == ("2", "3")


def test_a_block_of_several_outputs_is_looked_into(batch):
    """Which of its outputs is the stage nobody can tell; that its parts lie deeper than the stem does not count."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.down = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 1)
            self.block1, self.block2 = (Block(nn.Conv2d(8, 8, 3, 1, 1), twofold=True) for _ in range(2))
            self.fc = nn.Linear(8, 10)

        def forward(self, x):
            x, _ = self.block1(self.stem(x))
            x, _ = self.block2(self.down(x))
            return self.fc(x.mean((2, 3)))

    model = sfr.SFRWrapper(Net())
    train(model, batch[0])
    assert model.sfr.stage_names == ("block1.layer", "block2.layer")


def test_merged_tokens_keep_their_prefix():
    class Merging(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.ModuleList(Block(nn.Linear(8, 8)) for _ in range(2))
            self.fc = nn.Linear(8, 10)

        def forward(self, x):
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            tokens = self.blocks[0](torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1))
            merged = tokens[:, 1:].unflatten(1, (4, 4))[:, ::2, ::2].flatten(1, 2)
            return self.fc(self.blocks[1](torch.cat([tokens[:, :1], merged], dim=1))[:, 0])

    model = sfr.SFRWrapper(Merging())
    train(model, torch.randn(2, 3, 16, 16))
    assert model.sfr.stage_views == {"blocks.0": View("tokens", 1, (4, 4)), "blocks.1": View("tokens", 1, (4, 4))}


def test_layers_at_one_resolution_are_stages_evenly_spaced_in_depth(batch):
    body = [part for _ in range(9) for part in (nn.LazyConv2d(8, 3, padding=1), nn.ReLU())]
    model = sfr.SFRWrapper(Classifier(*body), example_input=batch[0])
    assert model.sfr.stage_names == ("body.3", "body.7", "body.11", "body")
    assert len(model.sfr.stage_names) == STAGES_IN_DEPTH


@pytest.mark.parametrize("stages", [None, r"blocks\.."])
def test_a_stated_number_of_prefix_tokens_wins(stages):
    vit = VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    model = sfr.SFRWrapper(vit, stages=stages, prefix_tokens=8)
    train(model, torch.randn(2, 3, 32, 32))
    assert model.sfr.stage_views["blocks.0"] == View("tokens", 8, (4, 4))


def test_more_prefix_tokens_than_tokens_are_an_error_that_names_the_stage():
    vit = VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    model = sfr.SFRWrapper(vit, stages=["blocks.0", "blocks.1"], prefix_tokens=17)
    with pytest.raises(ValueError, match=r"stage 'blocks.0' has 17 tokens, and prefix_tokens=17 leaves none"):
        train(model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("stages", [None, ["1", "3"]], ids=["found", "named"])
def test_prefix_tokens_of_stages_without_tokens_are_an_error(make_net, stages):
    for model in (
        sfr.SFRWrapper(make_net(), stages=stages, prefix_tokens=0),
        sfr.SFRWrapper(make_net(), stages=stages),
    ):
        model(torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"prefix_tokens=1 has no effect.*but channels_first\. Leave it out"):
        sfr.SFRWrapper(make_net(), stages=stages, prefix_tokens=1)(torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"prefix_tokens=1 has no effect.*channels_last"):
        sfr.SFRWrapper(make_net(), stages=stages, prefix_tokens=1, layout="channels_last")


def test_named_stages_lose_their_prefix_tokens_too():
    vit = VisionTransformer(32, 8, embed_dim=16, depth=3, num_heads=2, num_classes=10)
    model = sfr.SFRWrapper(vit, stages=["blocks.0", "blocks.2"])
    train(model, torch.randn(2, 3, 32, 32))
    assert list(model.sfr.stage_views.values()) == [View("tokens", 1, (4, 4))] * 2


def test_the_view_of_a_forward_that_nobody_watched_is_inferred_or_an_error_that_says_what_to_state():
    assert assumed_view(nn.Conv2d(3, 8, 1), torch.zeros(2, 8, 4, 4), StageSettings()) == View("channels_first")
    tokens = nn.Linear(3, 8), torch.zeros(2, 5, 8)
    assert assumed_view(*tokens, StageSettings(prefix_tokens=1)) == View("tokens", 1)
    with pytest.raises(ValueError, match=r"example_input=.*prefix_tokens="):
        assumed_view(*tokens, StageSettings())


class Attention(nn.Module):
    """Residual self-attention between (N, B, C) or (B, N, C), with PyTorch's layer or one of its own."""

    def __init__(self, width, order="sequence first", own=False):
        super().__init__()
        self.order, self.own, self.norm = order, own, nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width) if own else nn.MultiheadAttention(width, 2)

    def forward(self, x):
        y = self.norm(x)
        y = y if self.order == "sequence first" else y.transpose(0, 1)
        if self.own:
            parts = (part.transpose(0, 1) for part in self.attention(y).chunk(3, dim=-1))
            y = nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1)
        else:
            y = self.attention(y, y, y, need_weights=False)[0]
        return x + (y if self.order == "sequence first" else y.transpose(0, 1))


class Clip(nn.Module):
    """A vision transformer whose blocks see (N, B, C): a class token and 16 patches of an image of 16 x 16."""

    def __init__(self, make_block):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.Sequential(*(make_block() for _ in range(3)))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.token.expand(-1, x.shape[1], -1), x])
        return self.fc(self.blocks(x)[0])


BLOCKS = {
    "PyTorch's attention": lambda: Attention(16),
    "its own attention": lambda: Attention(16, own=True),
    "PyTorch's encoder layer": lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0),
}
STATED = {
    "discovered": {},
    "named": {"stages": [f"blocks.{k}" for k in range(3)]},
    "named, prefix stated": {"stages": r"blocks\..", "prefix_tokens": 1},
    "stated": {"stages": r"blocks\..", "layout": "sequence_first"},
}


def feature_terms(model, x):
    """Return the feature term of the images in their order and in another one."""
    criterion = sfr.SFRLoss(model, gate="none")
    terms = []
    for batch in (x, x.flip(0).roll(1, 0)):
        criterion(model(batch), torch.arange(len(x)) % 10)
        terms.append(criterion.last.feature)
    return terms


@pytest.mark.parametrize("options", STATED.values(), ids=STATED)
@pytest.mark.parametrize("images", [1, 6, 16, 34])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_tokens_with_the_batch_second_are_read_as_those_with_the_batch_first(block, images, options):
    model = sfr.SFRWrapper(Clip(block), **options)
    shuffled = feature_terms(model, torch.randn(images, 3, 16, 16))
    assert model.sfr.stage_views == {f"blocks.{k}": View("sequence_first", 1, (4, 4)) for k in range(3)}
    torch.testing.assert_close(*shuffled)
    features = {name: torch.randn(17, images, 16) for name in model.sfr.stage_names}
    swapped = {name: feature.transpose(0, 1) for name, feature in features.items()}
    criterion = sfr.SFRLoss(model)
    terms = criterion.terms_of(features)
    criterion.maps._views = {name: View("tokens", 1, (4, 4)) for name in features}
    assert [term.value for term in criterion.terms_of(swapped).values()] == [term.value for term in terms.values()]


@pytest.mark.parametrize("options", [{}, {"stages": r"blocks\..", "prefix_tokens": 1}], ids=["discovered", "named"])
def test_a_first_batch_as_large_as_the_sequence_is_read_right_or_an_error(options):
    x = torch.randn(17, 3, 16, 16)
    encoder = sfr.SFRWrapper(Clip(BLOCKS["PyTorch's encoder layer"]), **options)
    torch.testing.assert_close(*feature_terms(encoder, x))
    unclear = Clip(BLOCKS["PyTorch's attention"])
    with pytest.raises(ValueError, match=r"stage 'blocks.0' has shape \(17, 17, 16\).*layout='sequence_first'"):
        sfr.SFRWrapper(unclear, **options)(x)
    stated = sfr.SFRWrapper(Clip(BLOCKS["PyTorch's attention"]), layout="sequence_first", **options)
    torch.testing.assert_close(*feature_terms(stated, x))
    assert stated.sfr.stage_views["blocks.1"] == View("sequence_first", 1, (4, 4))


def test_tokens_with_the_batch_first_are_read_so_whatever_their_layers_say():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, 4)
            self.blocks = nn.Sequential(*(Attention(16, order="batch first") for _ in range(2)))
            self.fc = nn.Linear(16, 10)

        def forward(self, x):
            return self.fc(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    for images in (6, 16, 32):
        model = sfr.SFRWrapper(Net())
        if images == 16:
            with pytest.raises(ValueError, match="which of its first two axes is the batch"):
                model(torch.randn(images, 3, 16, 16))
        else:
            torch.testing.assert_close(*feature_terms(model, torch.randn(images, 3, 16, 16)))
            assert model.sfr.stage_views["blocks.0"] == View("tokens", 0, (4, 4))
        model.unwrap()


def test_a_layout_that_takes_images_for_tokens_is_an_error_that_names_the_right_one():
    model = sfr.SFRWrapper(Clip(BLOCKS["PyTorch's attention"]), stages=r"blocks\..", layout="tokens", prefix_tokens=1)
    with pytest.raises(ValueError, match=r"stage 'blocks.0' has shape \(17, 6, 16\).*state layout='sequence_first'"):
        train(model, torch.randn(6, 3, 16, 16))
    vit = VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    model = sfr.SFRWrapper(vit, stages=r"blocks\..", layout="sequence_first")
    with pytest.raises(ValueError, match=r"stage 'blocks.0' has shape \(6, 17, 16\).*state layout='tokens'"):
        train(model, torch.randn(6, 3, 32, 32))


def own_attention(order="sequence first"):
    return Attention(16, order, own=True)


class Patches(nn.Module):
    """Blocks that see (B, N, C) of the 16 patches of an image, whatever their layers do inside."""

    def __init__(self, order):
        super().__init__()
        self.patches, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 10)
        self.blocks = nn.Sequential(*(own_attention(order) for _ in range(2)))

    def forward(self, x):
        return self.fc(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("frozen", ["nothing", "patches", "all but the head"])
@pytest.mark.parametrize("options", [{}, {"stages": r"blocks\.."}], ids=["discovered", "named"])
def test_a_first_batch_as_long_as_the_sequence_is_read_by_what_depends_on_what(options, frozen):
    cases = [(Clip(own_attention), 17, "sequence_first"), (Patches("batch first"), 16, "tokens")]
    for net, images, layout in cases:
        for name, parameter in net.named_parameters():
            trained = {"nothing": True, "patches": "patches" not in name, "all but the head": "fc" in name}
            parameter.requires_grad_(trained[frozen])
        model = sfr.SFRWrapper(net, **options)
        x = torch.randn(images, 3, 16, 16)
        if frozen == "nothing":
            torch.testing.assert_close(*feature_terms(model, x))
            assert {view.layout for view in model.sfr.stage_views.values()} == {layout}
        else:
            with pytest.warns(UserWarning, match=r"stage 'blocks.0' has shape .* cannot be told.*'sequence_first'"):
                model(x)


def test_an_example_as_long_as_the_sequence_leaves_it_to_the_first_training_forward():
    for images in (17, 5):
        model = sfr.SFRWrapper(Clip(own_attention), example_input=torch.zeros(17, 3, 16, 16))
        torch.testing.assert_close(*feature_terms(model, torch.randn(images, 3, 16, 16)))
        assert model.sfr.stage_views == {f"blocks.{k}": View("sequence_first", 1, (4, 4)) for k in range(3)}


def test_a_tie_that_was_read_wrongly_is_an_error_at_the_next_batch_of_another_size():
    model = sfr.SFRWrapper(Clip(own_attention).requires_grad_(False))
    model.fc.requires_grad_(True)
    criterion = sfr.SFRLoss(model)
    with pytest.warns(UserWarning, match=r"cannot be told|are frozen"):
        criterion(model(torch.randn(17, 3, 16, 16)), torch.arange(17) % 10)
    with pytest.raises(ValueError, match=r"stage 'blocks.0' .*state layout='sequence_first'"):
        criterion(model(torch.randn(5, 3, 16, 16)), torch.arange(5))


def test_sequences_that_come_in_with_the_batch_second_are_read_so():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lstm = nn.Embedding(50, 16), nn.LSTM(16, 24)
            self.fc = nn.Linear(24, 10)

        def forward(self, words):
            return self.fc(self.lstm(self.embedding(words))[0][-1])

    for length, images in ((12, 5), (4, 8)):
        model = sfr.SFRWrapper(Tagger())
        logits = model(torch.randint(0, 50, (length, images)))
        sfr.SFRLoss(model)(logits, torch.arange(images)).backward()
        assert set(model.sfr.stage_views.values()) == {View("sequence_first")}
        model.unwrap()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Part(lambda x: x.flatten(0, 1)[:13].unflatten(1, (4, -1))), r"stage 'body.1' has shape \(13, .* batch of 8"),
        (Part(lambda x: torch.cat([x, x])), r"the stages have different batch sizes: 'body.0' 8, 'body.1' 16"),
    ],
)
def test_a_stage_that_is_not_of_the_batch_of_the_logits_is_an_error_that_names_it(batch, stage, message):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), stage]), nn.Linear(8, 10)

        def forward(self, x):
            x = self.body[0](x)
            self.body[1](x)
            return self.fc(x.mean((2, 3)))

    model = sfr.SFRWrapper(Net(), stages=["body.0", "body.1"])
    with pytest.raises(ValueError, match=message):
        train(model, batch[0])


def test_logits_flattened_over_positions_and_images_folded_into_the_batch_are_no_errors():
    class Net(nn.Module):
        """Two frames an image, and a class for each position."""

        def __init__(self):
            super().__init__()
            self.first, self.second, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 10)

        def forward(self, x):
            return self.fc(self.second(self.first(x.flatten(0, 1))).unflatten(0, (-1, 2)).mean(1).movedim(1, -1))

    model = sfr.SFRWrapper(Net(), stages=["first", "second"])
    logits = model(torch.randn(4, 2, 3, 16, 16)).flatten(0, 2)
    sfr.SFRLoss(model)(logits, torch.zeros(len(logits), dtype=torch.long)).backward()


def test_an_expression_that_matches_only_the_ends_of_names_is_an_error_that_says_so():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = models.resnet18()

        def forward(self, x):
            return self.backbone(x)

    message = (
        r"gives 0 stage.*Full names are matched, and these end so: backbone.layer1, backbone.layer2.*stages=(r'.*)'"
    )
    with pytest.raises(ValueError, match=message) as error:
        sfr.SFRWrapper(Net(), stages=r"layer[1-4]")
    advised = str(error.value).split("stages=r'")[1].split("'")[0]
    assert sfr.SFRWrapper(Net(), stages=advised).sfr.stage_names == tuple(f"backbone.layer{k}" for k in (1, 2, 3, 4))


def test_too_few_stages_are_an_error_that_gives_the_reason():
    image = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"cannot be read with layout='tokens'; 'conv1': layout 'tokens' needs 3 axes"):
        sfr.SFRWrapper(models.resnet18(), layout="tokens", example_input=image)
    single = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 30), nn.Flatten())
    with pytest.raises(ValueError, match=r"found 1 stage.*left out: 1 \(1 x 1\), whose map has a single cell"):
        sfr.SFRWrapper(single, example_input=image)
    windows = nn.Sequential(Part(lambda x: x.flatten(0, 1)[:, None]), nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
    flat = nn.Sequential(*windows, Part(lambda x: x.mean((1, 2, 3))))
    with pytest.raises(
        ValueError, match=r"no output has the batch, 2, as its first axis: '0' has shape \(6, 1, 32, 32\)"
    ):
        sfr.SFRWrapper(flat, example_input=image)
