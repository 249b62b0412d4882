"""The preflight report tells what will be done, and leaves nothing behind."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from transformers import ViTConfig, ViTForImageClassification

import sfr


def test_the_report_shows_stages_pairs_and_cost(make_net, batch):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()), max_grid=2, grouping="segments")
    report = criterion.report(batch[0], repeats=2)
    assert [row.name for row in report.stages] == ["1", "3", "5"]
    assert report.stages[1].shape == (8, 16, 8, 8)
    assert [(row.shallow, row.deep, row.nodes, row.channels, row.plans) for row in report.pairs] == [
        ("1", "3", (4, 4), 8, 2),
        ("1", "5", (4, 4), 8, 4),
        ("3", "5", (4, 4), 16, 2),
    ]
    assert report.time_ratio > 0
    assert report.sfr.peak_bytes > report.plain.peak_bytes > 0
    text = str(report)
    for part in ("ReLU", "8x16x8x8", "channels_first", "4 x 4", "auto (exact on cpu)", "with SFR"):
        assert part in text


@pytest.mark.parametrize(
    ("weight", "effect"),
    [
        (0.0, "Next to no effect"),
        (0.2, "A mild regularizer"),
        (2, "A strong regularizer"),
        (1000, "outweighs the labels"),
        (sfr.Ramp(1000, 0, 10), "outweighs the labels"),
    ],
)
def test_the_report_shows_the_terms_of_the_loss_and_what_they_will_do(make_net, batch, weight, effect):
    rising = weight if isinstance(weight, sfr.Ramp) else sfr.Ramp(0, weight, steps=1_000_000)
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()), feature_weight=rising)
    report = criterion.report(batch[0], repeats=1)
    parts = report.loss.as_dict()
    assert parts["label"] == pytest.approx(2.3, abs=0.3)  # of ten classes, untrained
    weight = 1000 if isinstance(weight, sfr.Ramp) else weight
    assert parts["weight"] == weight
    assert (parts["feature"] > 0) == (weight > 0)
    share = weight * parts["feature"] / (parts["label"] + weight * parts["feature"])
    lines = str(report).splitlines()
    [number] = [number for number, line in enumerate(lines) if line.startswith("loss:")]
    assert f"(share {share:.1%})" in lines[number]
    assert effect in lines[number + 1]


def test_the_report_shows_the_tokens_dropped_and_the_nodes_of_the_rest():
    vit = VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=10, reg_tokens=2)
    report = sfr.SFRLoss(sfr.SFRWrapper(vit), max_grid=3).report(torch.zeros(2, 3, 32, 32), repeats=1)
    assert [(row.layout, row.dropped) for row in report.stages] == [("tokens", 3)] * 2
    assert report.pairs[0].nodes == (9, 9)
    assert re.search(r"blocks.0 +Block +2x19x16 +tokens +3\n", str(report))


def test_the_report_takes_the_logits_out_of_a_model_output():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=32, patch_size=8, num_labels=10, **small)
    report = sfr.SFRWrapper(ViTForImageClassification(config)).report({"pixel_values": torch.zeros(2, 3, 32, 32)})
    assert [row.dropped for row in report.stages] == [1, 1]


def test_a_model_without_logits_cannot_be_reported(make_net, batch):
    net = make_net()
    net.append(Silent())
    with pytest.raises(TypeError, match="no logits"):
        sfr.SFRWrapper(net, stages=["1", "3"]).report(batch[0])


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
@pytest.mark.parametrize("weight", [0, 0.2])
def test_a_regression_of_one_number_an_image_can_be_reported(make_net, batch, shape, weight):
    net = make_net(classes=1).append(nn.Flatten(0) if len(shape) == 1 else nn.Identity())
    assert net(batch[0]).shape == shape
    model = sfr.SFRWrapper(net, stages=["1", "3", "5"])
    report = sfr.SFRLoss(model, feature_weight=weight).report(batch[0], repeats=1)
    assert len(report.pairs) == 3
    assert "loss:" not in str(report)


def test_a_model_that_computes_its_losses_itself_can_be_reported(make_net, batch):
    class OwnLosses(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()
            self.seen = []

        def forward(self, x, y):
            logits = self.net(x)
            losses = {"class": nn.functional.cross_entropy(logits, y), "size": logits.square().mean()}
            for loss in losses.values():
                loss.register_hook(lambda gradient: self.seen.append(gradient.item()))
            return losses

    net = OwnLosses()
    report = sfr.SFRWrapper(net, stages=["net.1", "net.3", "net.5"]).report(batch, repeats=1)
    assert len(report.pairs) == 3
    assert set(net.seen) == {0.5}  # every step went back through both


class Silent(nn.Module):
    def forward(self, x):
        return None


def test_the_report_leaves_the_model_as_it_was():
    plain = models.resnet18(num_classes=3)
    model = sfr.SFRWrapper(plain)
    model.eval()
    plain.conv1.weight.grad = torch.ones_like(plain.conv1.weight)
    before, state = copy.deepcopy(plain.state_dict()), torch.get_rng_state()
    model.report(torch.zeros(2, 3, 64, 64), repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert torch.equal(plain.conv1.weight.grad, torch.ones_like(plain.conv1.weight))
    assert plain.fc.weight.grad is None


def test_the_report_works_from_a_dict_of_arguments(make_net, batch):
    assert sfr.SFRWrapper(make_net()).report({"input": batch[0]}, repeats=1).stages


def test_a_batch_that_is_a_dict_can_be_given_by_name(make_net, batch):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, pixel_values, *, scale):
            return self.net(pixel_values) * scale

    criterion = sfr.SFRLoss(sfr.SFRWrapper(Named()))
    named = {"pixel_values": batch[0], "scale": 2.0}
    shapes = [
        [stage.shape for stage in report.stages]
        for report in (
            criterion.report(**named, repeats=1),
            criterion.report(batch[0], scale=2.0, repeats=1),
            criterion.model.report(**named, target=batch[1], repeats=1),
            criterion.report(named, repeats=1),
        )
    ]
    assert shapes == [shapes[0]] * 4
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'repeat'"):
        criterion.report(**named, repeat=1)


def test_a_fresh_criterion_is_not_touched_by_a_report(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model)
    model.report(batch[0], repeats=1)
    assert criterion.step == 0
    with pytest.raises(RuntimeError, match="no features are recorded"):
        criterion(torch.zeros(8, 10, requires_grad=True), batch[1])


@pytest.mark.parametrize(
    ("size", "notes"), [(32, ("left out: layer4 (1 x 1), whose map has a single cell",)), (64, ())]
)
@pytest.mark.parametrize("build", [models.resnet18, models.resnet34])
def test_a_last_stage_of_a_single_cell_is_noted(build, size, notes):
    report = sfr.SFRWrapper(build(num_classes=3)).report(torch.zeros(2, 3, size, size), repeats=1)
    assert report.notes == notes
    assert all(note in str(report) for note in notes)


@pytest.mark.parametrize("build", [models.mobilenet_v3_small, models.squeezenet1_1, models.efficientnet_b0])
def test_what_is_pooled_on_purpose_is_not_noted(build):
    model = sfr.SFRWrapper(build(num_classes=3), example_input=torch.zeros(1, 3, 64, 64))
    assert model.report(torch.zeros(2, 3, 64, 64), repeats=1).notes == ()


def test_a_report_without_classes_says_why_it_lacks_the_loss(make_net, batch):
    report = sfr.SFRWrapper(make_net(classes=1), stages=["1", "3"]).report(batch[0], repeats=1)
    assert (
        "the terms of the loss are not shown, because random labels cannot be drawn: the output is no classes"
        in str(report)
    )


@pytest.mark.parametrize("example", [lambda x, y: ((x, y),), lambda x, y: (x, y), lambda x, y: ({"x": x},)])
def test_an_example_that_the_model_does_not_take_is_an_error_that_explains(make_net, batch, example):
    with pytest.raises(
        TypeError, match=r"called as forward\(input\).*your loop calls the model with, as in model.report"
    ):
        sfr.SFRWrapper(make_net()).report(*example(*batch))
    with pytest.raises(TypeError, match=r"called as forward\(input\)"):
        sfr.SFRWrapper(make_net(), example_input=batch)


def test_a_model_of_several_inputs_is_reported_from_them(make_net, batch):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.embedding = make_net(), nn.Embedding(10, 3)

        def forward(self, x, t, y):
            return self.net(x * t[:, None, None, None] + self.embedding(y)[:, :, None, None])

    model = sfr.SFRWrapper(Conditioned())
    x, y = batch
    for example in ((x, torch.rand(8), y), ((x, torch.rand(8), y),), ({"x": x, "t": torch.rand(8), "y": y},)):
        assert len(model.report(*example, repeats=1).pairs) == 3


@pytest.mark.parametrize("samples", [5, 100])
def test_past_predictions_are_reported_without_an_index(make_net, batch, samples):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()), smoothing="past", num_samples=samples)
    report = criterion.report(batch[0], repeats=1)
    assert report.loss.as_dict()["label"] > 0


# The criterion's own report: its switches, its loss, and that it is left as it was.


def test_the_report_of_a_criterion_is_of_its_switches(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    switches = {"pairs": "last", "max_grid": 3, "grouping": "crop", "solver": "sinkhorn", "feature_weight": 0.7}
    report = sfr.SFRLoss(model, **switches).report(batch[0], repeats=1)
    assert [(row.shallow, row.deep, row.nodes, row.channels, row.plans) for row in report.pairs] == [
        ("1", "5", (9, 9), 8, 1),
        ("3", "5", (9, 9), 16, 1),
    ]
    assert list(report.loss.pairs) == ["1 <- 5", "3 <- 5"]
    assert report.solver == "sinkhorn"
    assert report.loss.weight == 0.7


def test_two_criteria_of_one_model_have_reports_of_their_own(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    first, second = (
        sfr.SFRLoss(model, pairs=[("1", "3")], gate="none"),
        sfr.SFRLoss(model, cost="sqeuclidean", gate="none"),
    )
    found = [criterion.report(batch[0], repeats=1) for criterion in (first, second, first)]
    assert [len(report.pairs) for report in found] == [1, 3, 1]
    with model.disable():
        images, expected = batch[0], model(batch[0])
    for criterion, report in zip((first, second), found, strict=False):
        criterion(model(images), expected.argmax(dim=1))
        torch.testing.assert_close(report.loss.feature, criterion.last.feature)


def test_the_short_form_of_the_model_is_the_report_of_a_criterion_without_switches(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    short, own = model.report(batch[0], repeats=1), sfr.SFRLoss(model).report(batch[0], repeats=1)
    assert (short.stages, short.pairs, short.solver, short.notes) == (own.stages, own.pairs, own.solver, own.notes)
    torch.testing.assert_close(short.loss.feature, own.loss.feature)
    assert short.loss.weight == own.loss.weight == 0.25


@pytest.mark.parametrize(
    ("switches", "amount"),
    [({}, 0.0), ({"smoothing": "uniform", "alpha": 0.3}, 0.3), ({"smoothing": "class_mean", "alpha": 0.3}, 0.3)],
)
def test_a_target_that_is_given_is_that_of_the_loss(make_net, batch, switches, amount):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()), **switches)
    expected = F.cross_entropy(criterion.model(batch[0]), batch[1], label_smoothing=amount)
    if criterion.config.smoothing != "class_mean":  # whose means move from step to step
        torch.testing.assert_close(criterion.report(batch[0], target=batch[1], repeats=1).loss.label, expected.detach())
    soft = F.one_hot(batch[1], 10).float()
    assert criterion.report(batch[0], target=soft, repeats=1).loss.label.isfinite()
    with pytest.raises(ValueError, match=r"class indices must lie in \[0, 9\]"):
        criterion.report(batch[0], target=batch[1] + 10, repeats=1)


def test_a_loss_of_ones_own_is_shown_if_a_target_is_given_and_else_a_note_asks_for_it(make_net, batch):
    several = torch.rand(8, 10).gt(0.7).float()
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()), feature_weight=0.5, label_loss=nn.BCEWithLogitsLoss())
    report = criterion.report(batch[0], target=several, repeats=1)
    expected = nn.BCEWithLogitsLoss()(criterion.model(batch[0]), several)
    torch.testing.assert_close(report.loss.label, expected.detach())
    assert report.loss.feature > 0
    assert "+ 0.5 x" in str(report)
    assert report.notes == ()
    report = criterion.report(batch[0], repeats=1)
    assert report.loss is None
    assert len(report.pairs) == 3
    assert re.search(r"note: .*the loss is your own.*criterion\.report\(x, target=y\)", str(report))


def test_a_regression_is_reported_with_its_own_loss_and_target(make_net, batch):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net(classes=1)), label_loss=nn.MSELoss())
    target = torch.randn(8, 1)
    report = criterion.report(batch[0], target=target, repeats=1)
    expected = F.mse_loss(criterion.model(batch[0]), target)
    torch.testing.assert_close(report.loss.label, expected.detach())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "switches",
    [
        {"smoothing": "class_mean", "feature_weight": sfr.Ramp(0, 0.5, steps=8)},
        {"smoothing": "class_mean", "update": "epoch"},
        {"smoothing": "past", "num_samples": 8},
        {"smoothing": "uniform", "alpha": sfr.Ramp(0, 0.5, steps=8)},
        {"smoothing": "none"},
    ],
)
def test_a_report_in_the_middle_of_a_training_changes_nothing_of_the_criterion(make_net, batch, switches, training):
    net = make_net()
    criteria = [sfr.SFRLoss(sfr.SFRWrapper(copy.deepcopy(net)), **switches) for _ in range(2)]

    def train(criterion, steps):
        labels = batch[1].roll(1)
        return [criterion(criterion.model(batch[0]), labels, index=torch.arange(8)).detach() for _ in range(steps)]

    for criterion in criteria:
        train(criterion, 3)
    reported, other = criteria
    reported.train(training)
    state, last = copy.deepcopy(reported.state_dict()), reported.last
    reported.report(batch[0], repeats=1)
    reported.report(batch[0], target=batch[1], repeats=1)
    assert reported.training == reported.labels.training == training
    assert reported.last is last
    assert state.keys() == reported.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in reported.state_dict().items())
    reported.train()
    assert train(reported, 3) == train(other, 3)


def test_a_report_changes_nothing_of_a_loss_of_ones_own(make_net, batch):
    class Weighed(nn.Module):
        """Weighs the loss by a parameter, and counts its calls."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, output, target):
            self.calls += 1
            return F.cross_entropy(output, target) * self.scale

    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()), label_loss=Weighed())
    criterion.report(batch[0], target=batch[1], repeats=1)
    assert criterion.label_loss.calls == 0
    assert criterion.label_loss.scale.grad is None


@pytest.mark.parametrize("switches", [{"smoothing": "uniform", "alpha": 0.2}, {"smoothing": "past", "num_samples": 9}])
def test_label_smoothing_keeps_no_model_without_classes_from_a_report(make_net, batch, switches):
    model = sfr.SFRWrapper(nn.Sequential(make_net(), nn.Linear(10, 1)))
    assert sfr.SFRLoss(model, **switches).report(batch[0], repeats=1).loss is None


def test_the_report_says_whether_its_labels_are_random_or_given(make_net, batch):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()))
    random, given = criterion.report(batch[0], repeats=1), criterion.report(batch[0], target=batch[1], repeats=1)
    assert "), on random labels\n" in str(random)
    assert "), on the given target\n" in str(given)


def test_the_report_of_a_network_that_has_fitted_its_labels_gives_no_alarm(make_net, batch):
    net = make_net()
    with torch.no_grad():
        net[-1].weight.zero_()
        net[-1].bias.copy_(torch.eye(10)[3] * 50)
    criterion = sfr.SFRLoss(sfr.SFRWrapper(net), feature_weight=1.0)
    text = str(criterion.report(batch[0], target=torch.full((8,), 3), repeats=1))
    assert "The labels are fitted: what is left of the loss is the feature term." in text
    assert "outweighs" not in text


def test_labels_given_to_the_report_as_if_to_the_model_are_named(make_net, batch):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()))
    with pytest.raises(TypeError, match=r"criterion\.report\(x, target=y\)"):
        criterion.report(*batch)


class LanguageModel(nn.Module):
    """Logits (B, T, K) of 30 tokens, from layers whose batch is the first or the second axis."""

    def __init__(self, batch_first):
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.layers = nn.ModuleList(nn.GRU(16, 16, batch_first=batch_first) for _ in range(3))
        self.head = nn.Linear(16, 30)

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_model_of_tokens_is_reported_with_a_label_at_each_position(batch_first):
    report = sfr.SFRLoss(sfr.SFRWrapper(LanguageModel(batch_first))).report(torch.randint(30, (4, 6)), repeats=1)
    assert report.loss.label == pytest.approx(math.log(30), rel=0.1)  # of six classes, as T would be, it is 1.8


@pytest.mark.parametrize("flat", [False, True])
def test_a_model_of_tokens_is_reported_on_the_labels_of_its_tokens(flat):
    model, x, target = sfr.SFRWrapper(LanguageModel(True)), torch.randint(30, (4, 6)), torch.randint(30, (4, 6))
    report = sfr.SFRLoss(model).report(x, target=target.flatten() if flat else target, repeats=1)
    expected = F.cross_entropy(model(x).flatten(0, 1), target.flatten())
    assert report.loss.label == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_of_a_loss_of_ones_own_the_report_does_not_say_that_labels_are_fitted(reduction):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(1))
    criterion = sfr.SFRLoss(sfr.SFRWrapper(net, stages=["0", "2"]), label_loss=nn.MSELoss(reduction=reduction))
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        target = net(x) * 1.01 if reduction == "mean" else net(x) + 100
    text = str(criterion.report(x, target=target, repeats=1))
    assert "labels" not in text
    assert ("outweighs your loss" if reduction == "mean" else "your loss is much larger") in text


def test_a_named_stage_that_did_not_run_is_noted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layers[1](self.layers[0](x).relu()).relu())

    model = sfr.SFRWrapper(Net(), stages=r"layers\.[0-2]")
    assert "note:   stage 'layers.2' did not run in this forward" in str(sfr.SFRLoss(model).report(torch.randn(4, 8)))


@pytest.mark.parametrize(
    "output",
    [lambda z: (z, z * 2), lambda z: {"pred": z}, lambda z: {"logits": z, "aux_logits": 2 * z}, lambda z: [z, z]],
)
@pytest.mark.parametrize("given", [False, True], ids=["random labels", "given labels"])
def test_a_model_whose_loop_picks_the_logits_is_reported(make_net, batch, output, given):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, images):
            return output(self.net(images))

    report = sfr.SFRLoss(sfr.SFRWrapper(Net())).report(batch[0], target=batch[1] if given else None, repeats=1)
    assert len(report.stages) == 3
    assert report.loss.label > 0
    assert not report.notes


def test_an_empty_batch_and_no_repeats_are_errors_that_say_so(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    with pytest.raises(ValueError, match="at least one image"):
        model.report(batch[0][:0])
    with pytest.raises(ValueError, match="repeats must be"):
        model.report(batch[0], repeats=0)


def test_a_loader_or_an_array_in_the_place_of_a_batch_is_an_error_that_says_what_to_give(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    with pytest.raises(TypeError, match="got a DataLoader: give it a batch of it"):
        model.report(DataLoader(TensorDataset(*batch), 4))
    with pytest.raises(TypeError, match=r"got a ndarray: give it torch\.from_numpy"):
        model.report(batch[0].numpy())
