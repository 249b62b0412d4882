"""The criterion is label term + weight(t) * feature term, and says so when it cannot be."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn
from torchvision.transforms import v2

import sfr


@pytest.fixture
def build(make_net, batch):
    """Return a builder of (wrapped model, criterion) with the stages '1', '3', '5'."""

    def build(record_in_eval=False, **switches):
        model = sfr.SFRWrapper(make_net(), example_input=batch[0], record_in_eval=record_in_eval)
        return model, sfr.SFRLoss(model, **switches)

    return build


@pytest.mark.parametrize("grouping", ["segments", "mean"])
def test_the_loss_is_the_label_term_and_the_mean_over_pairs_of_emd_l2(build, batch, grouping):
    model, criterion = build(feature_weight=0.3, gate="none", max_grid=2, cost="sqeuclidean", grouping=grouping)
    logits = model(batch[0])
    maps = [F.adaptive_avg_pool2d(feature, 2) for feature in model._sfr.recorder.features.values()]
    nodes = [feature.flatten(2).transpose(1, 2) for feature in maps]
    terms = []
    for shallow, deep in ((0, 1), (0, 2), (1, 2)):
        segments = torch.stack(nodes[deep].split(nodes[shallow].shape[2], dim=2))
        supervisors = segments if grouping == "segments" else segments.mean(dim=0, keepdim=True)
        terms.append(torch.stack([sfr.emd_l2(nodes[shallow], nodes_of_deep) for nodes_of_deep in supervisors]).mean())
    expected = F.cross_entropy(logits, batch[1]) + 0.3 * torch.stack(terms).mean()
    loss = criterion(logits, batch[1])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.stack(list(criterion.last.pairs.values())), torch.stack(terms))


@pytest.mark.parametrize("pairs", ["all", "last", "adjacent", [("1", "5")]])
@pytest.mark.parametrize("grouping", ["segments", "mean", "crop"])
@pytest.mark.parametrize("marginals", ["uniform", "cross"])
@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean", "correlation"])
def test_every_combination_of_options_trains(build, batch, pairs, grouping, marginals, cost):
    model, criterion = build(pairs=pairs, grouping=grouping, marginals=marginals, cost=cost, feature_weight=1.0)
    criterion(model(batch[0]), batch[1])
    feature_only = criterion.last.feature
    assert feature_only.isfinite()
    assert feature_only > 0
    assert len(criterion.last.pairs) == {"all": 3, "last": 2, "adjacent": 2}.get(str(pairs), 1)


def feature_gradients(model, criterion, batch):
    """Gradients of the feature term alone, by parameter name."""
    logits = model(batch[0])
    loss = criterion(logits, batch[1]) - F.cross_entropy(logits, batch[1])
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {
        name: 0.0 if gradient is None else gradient.abs().sum().item()
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True)
    }


def test_the_deep_side_is_not_moved_by_the_feature_term(build, batch):
    gradients = feature_gradients(*build(pairs=[("1", "3")], smoothing="none", feature_weight=1.0), batch)
    assert gradients["0.weight"] > 1e-4
    assert gradients["2.weight"] < 1e-6


def test_the_deep_side_is_moved_if_asked_for(build, batch):
    options = {"pairs": [("1", "3")], "smoothing": "none", "feature_weight": 1.0, "detach_deep": False}
    assert feature_gradients(*build(**options), batch)["2.weight"] > 1e-4


def test_a_deep_stage_narrower_or_of_odd_width_supervises_too(batch):
    for widths in ((16, 8, 4), (6, 10, 15)):
        layers = [nn.Conv2d(i, o, 3, 2, 1) for i, o in zip((3, *widths), widths, strict=False)]
        model = sfr.SFRWrapper(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        criterion = sfr.SFRLoss(model, feature_weight=1.0)
        criterion(model(batch[0]), batch[1] % widths[-1]).backward()
        assert criterion.last.feature > 0


def test_a_map_can_supervise_one_of_fewer_nodes():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Upsample(scale_factor=3), nn.Conv2d(4, 8, 3))
    model = sfr.SFRWrapper(nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten()), stages=["0.0", "0.2"])
    criterion = sfr.SFRLoss(model)
    criterion(model(torch.randn(2, 3, 12, 12)), torch.tensor([0, 1])).backward()
    assert criterion.last.feature > 0


def test_nodes_of_a_model_spread_over_devices_meet_where_its_last_stage_is(build, batch):
    model, criterion = build()
    model(batch[0])
    features = model._sfr.recorder.features | {"5": torch.empty(8, 32, 4, 4, device="meta")}
    for pair in criterion.pairs_of(features):
        assert {part.device.type for part in (*pair.nodes, pair.finite)} == {"meta"}


def test_a_vector_stage_is_one_node(make_net, batch):
    model = sfr.SFRWrapper(make_net(), stages=["5", "7"])
    criterion = sfr.SFRLoss(model)
    criterion(model(batch[0]), batch[1]).backward()
    assert criterion.last.feature > 0


def test_the_weight_warms_up_linearly(build, batch):
    model, criterion = build(feature_weight=sfr.Ramp(0, 0.5, steps=4))
    weights = []
    for _ in range(6):
        criterion(model(batch[0]), batch[1])
        weights.append(criterion.last.weight)
    assert weights == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_the_parts_of_the_last_loss_add_up_and_hold_no_graph(build, batch):
    model, criterion = build(feature_weight=0.2)
    with pytest.raises(RuntimeError, match="there was none yet"):
        _ = criterion.last
    loss = criterion(model(batch[0]), batch[1])
    parts = criterion.last.as_dict()
    assert parts["label"] + parts["weight"] * parts["feature"] == pytest.approx(loss.item(), rel=1e-6)
    assert not criterion.last.label.requires_grad
    assert not criterion.last.feature.requires_grad
    assert list(criterion.last.pairs) == ["1 <- 3", "1 <- 5", "3 <- 5"]


def test_the_criterion_owns_no_parameter_of_the_model(build):
    _, criterion = build(smoothing="class_mean")
    assert not list(criterion.parameters())
    assert sorted(criterion.state_dict()) == ["labels.counts", "labels.distributions", "labels.step", "step"]


def test_validation_loss_is_plain_cross_entropy_and_changes_nothing(build, batch):
    model, criterion = build()
    expected = F.cross_entropy(model.eval()(batch[0]), batch[1])
    with torch.no_grad():
        assert torch.equal(criterion(model(batch[0]), batch[1]), expected)
    assert torch.equal(criterion.eval()(model(batch[0]), batch[1]), expected)
    assert criterion.step == criterion.labels.step == 0


def test_bfloat16_autocast_gives_a_float32_loss_near_that_of_float32(build, batch):
    model, criterion = build(feature_weight=1.0)
    expected = criterion(model(batch[0]), batch[1])
    criterion = sfr.SFRLoss(model, feature_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(model(batch[0]), batch[1])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


def test_no_forward_before_the_criterion_is_an_error(build, batch):
    _, criterion = build()
    with pytest.raises(RuntimeError, match="no features are recorded"):
        criterion(torch.randn(8, 10, requires_grad=True), batch[1])


def test_logits_of_an_evaluation_forward_given_in_training_mode_are_an_error_that_says_what_to_do(build, batch):
    model, criterion = build()
    model(batch[0])  # features of an older forward must not be used instead
    logits = model.eval()(batch[0])
    model.train()
    with pytest.raises(RuntimeError, match=r"training mode.*criterion\.eval\(\)"):
        criterion(logits, batch[1])


def test_a_validation_with_gradient_is_the_plain_loss_and_warns_once(build, batch):
    model, criterion = build()
    criterion(model(batch[0]), batch[1])
    before = copy.deepcopy(criterion.state_dict())
    model(batch[0])  # and is left unused
    model.eval()
    with pytest.warns(UserWarning, match=r"evaluation mode.*SFRWrapper\(model, record_in_eval=True\)") as caught:
        losses = [
            criterion(logits, batch[1]) - F.cross_entropy(logits, batch[1]) for logits in map(model, [batch[0]] * 3)
        ]
    assert losses == [0, 0, 0]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    torch.testing.assert_close(criterion.state_dict(), before)
    criterion(model.train()(batch[0]), batch[1])
    assert criterion.step == 2


def test_a_model_may_be_trained_in_evaluation_mode_if_the_wrapper_is_told(build, batch):
    model, criterion = build(record_in_eval=True)
    losses = []
    for mode in (True, False):
        model.train(mode)
        losses.append(criterion(model(batch[0]), batch[1]))
        assert criterion.last.feature > 0
    assert criterion.step == 2
    with torch.no_grad():
        assert criterion(model(batch[0]), batch[1]) == F.cross_entropy(model(batch[0]), batch[1])


def test_an_evaluated_criterion_is_no_unused_wrapper(build, batch):
    model, criterion = build()
    criterion.eval()
    for _ in range(30):
        criterion(model(batch[0]), batch[1])
    criterion.train()
    for _ in range(30):
        with torch.no_grad():
            criterion(model(batch[0]), batch[1])
        with model.disable():
            criterion(model(batch[0]), batch[1])


def test_logits_of_another_batch_are_an_error(build, batch):
    model, criterion = build()
    old = model(batch[0])
    model(torch.randn_like(batch[0]))
    with pytest.raises(RuntimeError, match="do not come from the last training forward"):
        criterion(old, batch[1])


def test_detached_logits_are_an_error(build, batch):
    model, criterion = build()
    with pytest.raises(RuntimeError, match="do not come from the last training forward"):
        criterion(model(batch[0]).detach(), batch[1])


@pytest.fixture
def several_labels():
    """Which of the 10 classes are in each of the 8 images."""
    return torch.rand(8, 10, generator=torch.Generator().manual_seed(1)).gt(0.7).float()


def test_a_loss_of_ones_own_takes_the_place_of_the_label_term(build, batch, several_labels):
    model, _ = build()
    loss_function = nn.BCEWithLogitsLoss(pos_weight=torch.arange(1.0, 11.0))
    criterion = sfr.SFRLoss(model, feature_weight=0.3, label_loss=loss_function)
    logits = model(batch[0])
    loss = criterion(logits, several_labels)
    label = loss_function(logits, several_labels)
    assert torch.equal(criterion.last.label, label)
    assert criterion.last.feature > 0
    torch.testing.assert_close(loss, label + 0.3 * criterion.last.feature)
    assert (criterion.step, criterion.labels.step) == (1, 0)
    assert "label_loss.pos_weight" in criterion.state_dict()
    with model.disable():
        assert torch.equal(criterion(logits, several_labels), label)
    assert torch.equal(criterion.eval()(logits, several_labels), label)


def test_with_weight_zero_a_loss_of_ones_own_trains_bit_for_bit_as_without(build, batch, several_labels):
    def gradients(model, loss_function):
        loss_function(model(batch[0]), several_labels).backward()
        return [parameter.grad for parameter in model.parameters()]

    model, _ = build()
    ours = gradients(model, sfr.SFRLoss(model, feature_weight=0, label_loss=F.binary_cross_entropy_with_logits))
    model.zero_grad()
    plain = gradients(model.unwrap(), F.binary_cross_entropy_with_logits)
    assert all(map(torch.equal, ours, plain))


def test_a_model_may_compute_its_loss_itself(make_net, batch):
    class OwnLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x, y):
            return {"class": F.cross_entropy(self.net(x), y), "entropy": self.net[0].weight.square().sum()}

    model = sfr.SFRWrapper(OwnLoss(), stages=["net.1", "net.3", "net.5"])
    criterion = sfr.SFRLoss(model, feature_weight=1.0, label_loss=lambda loss, _: loss)
    label = sum(model(*batch).values())
    loss = criterion(label, None)
    torch.testing.assert_close(loss, label + criterion.last.feature)
    assert criterion.last.feature > 0
    with pytest.raises(RuntimeError, match="no features are recorded"):
        criterion(label, None)


@pytest.mark.parametrize(
    ("label_loss", "message"),
    [(nn.BCEWithLogitsLoss(reduction="none"), r"0-d tensor; got \(8, 10\)"), (lambda *_: 1.0, "0-d tensor; got float")],
)
def test_a_loss_of_ones_own_that_is_no_number_is_an_error(build, batch, several_labels, label_loss, message):
    model, _ = build()
    with pytest.raises(ValueError, match=message):
        sfr.SFRLoss(model, label_loss=label_loss)(model(batch[0]), several_labels)


def test_a_loss_of_ones_own_that_is_no_function_is_an_error(build):
    with pytest.raises(TypeError, match="label_loss must be a function of output and target, or None; got 'bce'"):
        sfr.SFRLoss(build()[0], label_loss="bce")


def test_a_model_without_wrapper_is_an_error(make_net):
    with pytest.raises(TypeError, match=r"needs an SFRWrapper.*got Sequential"):
        sfr.SFRLoss(make_net())


def test_the_wrapper_is_found_inside_other_wrappers(build):
    class Parallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model, _ = build()
    assert sfr.SFRLoss(Parallel(model)).model is model


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.full((8,), 10), r"class indices must lie in \[0, 9\].*; got values from 10 to 10"),
        (torch.full((8,), -1), r"got values from -1"),
        (torch.rand(8, 9), r"soft targets must have the shape of the logits, \(8, 10\); got \(8, 9\)"),
        (
            torch.zeros(4, dtype=torch.long),
            r"class indices must have shape \(8,\) for logits of shape \(8, 10\); got \(4,\)",
        ),
    ],
)
def test_targets_that_do_not_fit_are_an_error(build, batch, target, message):
    model, criterion = build()
    with pytest.raises(ValueError, match=message):
        criterion(model(batch[0]), target)


def test_soft_targets_train(build, batch):
    model, criterion = build()
    soft = torch.rand(8, 10).softmax(dim=1)
    criterion(model(batch[0]), soft).backward()
    assert criterion.last.label > 0


@pytest.mark.parametrize(("trained", "warned"), [(["8."], True), (["2."], False), ([""], False)])
def test_a_feature_term_that_trains_nothing_warns_once(make_net, batch, trained, warned):
    net = make_net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(trained)))
    model = sfr.SFRWrapper(net, stages=["1", "3", "5"])
    criterion = sfr.SFRLoss(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            criterion(model(batch[0]), batch[1]).backward()
    assert [("are frozen" in str(warning.message)) for warning in caught] == [True] * warned


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_features_of_one_image_warn_once_and_spare_the_others(make_net, batch, value):
    net = make_net()
    model = sfr.SFRWrapper(net, stages=["1", "3", "5"])
    criterion = sfr.SFRLoss(model, feature_weight=1.0)
    criterion(model(batch[0]), batch[1])
    sound = criterion.last.feature

    def spoil(model):
        feature = model._sfr.recorder.features["1"]
        model._sfr.recorder.features["1"] = torch.cat([torch.full_like(feature[:1], value), feature[1:]])

    losses = []
    for _ in range(2):
        logits = model(batch[0])
        spoil(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = criterion(logits, batch[1])
        losses.append((loss, [str(warning.message) for warning in caught]))
    assert len(losses[0][1]) == 1
    assert "non-finite features" in losses[0][1][0]
    assert not losses[1][1]
    assert 0 < criterion.last.feature < sound
    losses[1][0].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# Targets and outputs of other tasks.


@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
@pytest.mark.parametrize("config", [{}, {"smoothing": "none"}], ids=["default", "features alone"])
def test_mixup_and_cutmix_of_torchvision_train_with_their_own_targets(build, batch, kind, config):
    model, criterion = build(**config)
    images, targets = getattr(v2, kind)(num_classes=10)(*batch)
    assert ((targets > 0).sum(dim=1) > 1).any()
    criterion(model(images), targets).backward()
    torch.testing.assert_close(criterion.last.label, F.cross_entropy(model(images), targets).detach())
    assert criterion.last.feature > 0


def test_crops_stacked_in_the_batch_are_that_many_images(build, batch):
    model, criterion = build(feature_weight=0.5)
    crops, targets = torch.cat([batch[0], batch[0].flip(3)]), batch[1].repeat(2)
    criterion(model(crops), targets)
    stacked = criterion.last.feature
    terms = []
    for images in crops.chunk(2):
        criterion(model(images), batch[1])
        terms.append(criterion.last.feature)
    torch.testing.assert_close(stacked, torch.stack(terms).mean())


def test_one_backward_serves_forwards_of_several_crop_sizes(build, batch):
    model, criterion = build(feature_weight=0.5, smoothing="none")
    sizes = (16, 12)
    separate = []
    for size in sizes:
        model.zero_grad()
        criterion(model(batch[0][:, :, :size, :size]), batch[1]).backward()
        separate.append([parameter.grad.clone() for parameter in model.parameters()])
    model.zero_grad()
    sum(criterion(model(batch[0][:, :, :size, :size]), batch[1]) for size in sizes).backward()
    for parameter, *parts in zip(model.parameters(), *separate, strict=True):
        torch.testing.assert_close(parameter.grad, sum(parts))


def test_several_forwards_before_the_criterion_are_an_error(build, batch):
    model, criterion = build()
    outputs = [model(images) for images in batch[0].chunk(2)]
    with pytest.raises(RuntimeError, match="call the criterion right after each forward"):
        criterion(outputs[0], batch[1][:4])


class Segmenter(nn.Module):
    """Returns what `pack` makes of logits (B, 3, H, W)."""

    def __init__(self, pack):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.head = nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(8, 3, 1))
        self.pack = pack

    def forward(self, images):
        return self.pack(self.head(self.down2(self.down1(images).relu()).relu()))


def segmenter(pack=lambda logits: logits, **switches):
    model = sfr.SFRWrapper(Segmenter(pack), stages=["down1", "down2"])
    return model, sfr.SFRLoss(model, **switches)


@pytest.fixture
def segmentation_batch(batch):
    labels = torch.randint(0, 3, (8, 16, 16))
    labels[:, :3] = 255
    return batch[0], labels


@pytest.mark.parametrize("smoothing", ["class_mean", "uniform", "none"])
def test_segmentation_trains_and_leaves_ignored_labels_out(segmentation_batch, smoothing):
    images, labels = segmentation_batch
    alpha = None if smoothing == "none" else 0.2
    model, criterion = segmenter(feature_weight=0.5, smoothing=smoothing, alpha=alpha, ignore_index=255)
    logits = model(images)
    criterion(logits, labels).backward()
    amount = 0.0 if smoothing == "none" else 0.2
    expected = F.cross_entropy(logits, labels, ignore_index=255, label_smoothing=amount)
    torch.testing.assert_close(criterion.last.label, expected.detach())
    assert criterion.last.feature > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_segmentation_validation_loss_leaves_ignored_labels_out(segmentation_batch):
    images, labels = segmentation_batch
    model, criterion = segmenter(ignore_index=255)
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(criterion(logits, labels), F.cross_entropy(logits, labels, ignore_index=255))


@pytest.mark.parametrize("key", ["out", "logits"])
def test_logits_are_found_in_a_mapping(segmentation_batch, key):
    images, labels = segmentation_batch
    model, criterion = segmenter(lambda logits: {"hidden_states": (), key: logits}, ignore_index=255)
    expected_model, expected = segmenter(ignore_index=255)
    expected_model.load_state_dict(model.state_dict())
    torch.testing.assert_close(criterion(model(images), labels), expected(expected_model(images), labels))
    assert criterion.last.feature > 0


def test_a_segmentation_model_of_torchvision_trains(segmentation_batch):
    net = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    model = sfr.SFRWrapper(net, stages=["backbone.4", "backbone.16"])
    criterion = sfr.SFRLoss(model)
    criterion(model(segmentation_batch[0]), segmentation_batch[1] % 3).backward()
    assert criterion.last.feature > 0


def test_a_detector_of_torchvision_trains_with_its_own_losses():
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    detector = build(weights=None, weights_backbone=None, num_classes=3, min_size=64)
    model = sfr.SFRWrapper(detector, stages=["backbone.body.3", "backbone.body.6", "backbone.body.12"])
    criterion = sfr.SFRLoss(model, label_loss=lambda loss, _: loss)
    image, target = torch.rand(3, 64, 80), {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
    criterion(sum(model([image, image], [target, target]).values()), None).backward()
    assert len(criterion.last.pairs) == 3
    assert criterion.last.feature > 0
    of_the_losses = sfr.SFRLoss(model, label_loss=lambda losses, _: sum(losses.values()))
    of_the_losses(model([image, image], [target, target]), None).backward()
    assert of_the_losses.last.label.isfinite()
    assert of_the_losses.last.feature > 0


def test_auxiliary_logits_are_refused_with_the_way_out(segmentation_batch):
    images, labels = segmentation_batch
    model, criterion = segmenter(lambda logits: {"out": logits, "aux": logits}, ignore_index=255)
    with pytest.raises(ValueError, match=r"output holds auxiliary logits.*criterion\(output\['out'\], target\) \+"):
        criterion(model(images), labels)
    output = model(images)
    assert criterion(output["out"], labels).isfinite()


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (lambda logits: (logits, logits), r"output must be a tensor of logits.*got tuple.*criterion\(output\[0\]"),
        (lambda logits: {"masks": logits}, r"output must hold logits as one of 'logits' and 'out'.*\['masks'\]"),
        (lambda logits: {"out": logits, "logits": logits}, r"output must hold logits as one of 'logits' and 'out'"),
    ],
)
def test_output_without_clear_logits_is_refused(segmentation_batch, pack, message):
    model, criterion = segmenter(pack)
    with pytest.raises(TypeError, match=message):
        criterion(model(segmentation_batch[0]), segmentation_batch[1])


@pytest.mark.parametrize("training", [True, False])
def test_share_of_an_accumulated_batch_is_by_its_labels(segmentation_batch, training):
    images, labels = segmentation_batch
    labels = labels.where(labels != 255, -100)
    model, criterion = segmenter(feature_weight=0.5, smoothing="none")
    model.train(training)
    criterion.train(training)
    labelled = (labels != -100).sum()
    whole = criterion(model(images), labels)
    share = criterion(model(images), labels, num_items_in_batch=4 * labelled)
    torch.testing.assert_close(share, whole / 4)


@pytest.mark.parametrize("target", [None, {"class": 1}])
def test_a_share_of_targets_that_cannot_be_counted_is_an_error(build, batch, target):
    model, criterion = build(label_loss=lambda output, _: output.square().mean(), smoothing="none")
    with pytest.raises(TypeError, match="num_items_in_batch needs a target that is a tensor"):
        criterion(model(batch[0]), target, num_items_in_batch=8)


# The interface of nn.CrossEntropyLoss, and what a first user tries.


def test_the_names_of_cross_entropy_are_taken(build, batch):
    model, criterion = build(smoothing="none")
    expected = criterion(model(batch[0]), batch[1])
    assert criterion(input=model(batch[0]), target=batch[1]) == expected
    assert criterion.eval()(input=model(batch[0]), target=batch[1]) == F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("arguments", [{}, {"target": torch.zeros(8, dtype=torch.long)}])
def test_a_call_without_an_output_or_a_target_is_an_error(build, batch, arguments):
    with pytest.raises(TypeError, match=r"output must be a tensor of logits.*got NoneType"):
        build()[1](**arguments)
    model, criterion = build()
    with pytest.raises(TypeError, match="target must be a tensor; got NoneType"):
        criterion(model(batch[0]))


@pytest.mark.parametrize("smoothing", ["past", "class_mean"])
def test_numbers_of_samples_by_position_are_an_error_that_says_how(build, batch, smoothing):
    model, criterion = build(smoothing=smoothing, num_samples=8 if smoothing == "past" else None)
    with pytest.raises(TypeError, match=r"criterion\(output, target, index=index\)"):
        criterion(model(batch[0]), batch[1], torch.arange(8))
    criterion(model(batch[0]), batch[1], index=torch.arange(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 0.1}, "no argument 'weight'; it is called feature_weight"),
        ({"weight": torch.ones(10)}, r"class weights.*label_loss=nn.CrossEntropyLoss\(weight=...\)"),
        ({"weight": [1.0] * 10}, r"class weights.*label_loss=nn.CrossEntropyLoss\(weight=...\)"),
        ({"weight": np.ones(10)}, r"class weights.*label_loss=nn.CrossEntropyLoss\(weight=...\)"),
        ({"label_smoothing": 0.1}, r"SFRLoss\(model, smoothing='uniform', alpha=0.1\)"),
        ({"reduction": "sum"}, r"mean over the batch: multiply it by len\(target\)"),
        ({"layout": "tokens"}, r"set it where the model is wrapped: SFRWrapper\(model, layout='tokens'\)"),
        ({"label_los": None}, "no argument 'label_los'; near names: 'label_loss'"),
        ({"feature_wieght": 0.1}, "near names: 'feature_weight'"),
        ({"wieght": 0.1}, "near names: 'feature_weight'"),
        ({"qqqq": 1}, "it takes feature_weight, gate, pairs, .*, ignore_index, label_loss, num_classes"),
    ],
)
def test_an_argument_it_does_not_take_is_an_error_that_says_what_to_use(build, arguments, message):
    with pytest.raises(TypeError, match=message):
        sfr.SFRLoss(build()[0], **arguments)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("switches", [{}, {"gate": "none"}, {"smoothing": "class_mean"}, {"smoothing": "uniform"}])
def test_class_indices_of_any_integer_type_give_the_same_loss(build, batch, dtype, switches):
    losses = []
    for target in (batch[1], batch[1].to(dtype)):
        torch.manual_seed(0)
        model, criterion = build(**switches)
        losses.append(criterion(model(batch[0]), target))
    assert torch.equal(*losses)


def test_output_and_target_in_the_wrong_order_are_said_to_be(build, batch):
    model, criterion = build()
    with pytest.raises(ValueError, match=r"logits must be floating.*The order is criterion\(output, target\)"):
        criterion(batch[1], model(batch[0]))


def test_a_class_as_the_loss_of_ones_own_is_an_error_that_asks_for_an_instance(build):
    with pytest.raises(
        TypeError, match=r"instance; got the class CrossEntropyLoss: pass label_loss=CrossEntropyLoss\("
    ):
        sfr.SFRLoss(build()[0], label_loss=nn.CrossEntropyLoss)


def test_a_loss_of_ones_own_gets_the_output_of_the_model(batch):
    config = transformers.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8, num_labels=10)
    model = sfr.SFRWrapper(transformers.ResNetForImageClassification(config))
    given = []

    def own_loss(output, target):
        given.append((output, target))
        return output.loss

    criterion = sfr.SFRLoss(model, feature_weight=0.5, label_loss=own_loss)
    output = model(pixel_values=batch[0], labels=batch[1])
    loss = criterion(output, "whatever")
    assert given == [(output, "whatever")]
    torch.testing.assert_close(loss, output.loss + 0.5 * criterion.last.feature)
    assert criterion.last.feature > 0
    assert torch.equal(criterion.eval()(output, None), output.loss)


def test_a_loss_of_ones_own_may_take_a_dict_of_losses(make_net, batch):
    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x, y):
            logits = self.net(x)
            return {"count": torch.tensor(8.0), "class": F.cross_entropy(logits, y), "size": logits.square().mean()}

    model = sfr.SFRWrapper(Losses(), stages=["net.1", "net.3", "net.5"])
    criterion = sfr.SFRLoss(model, feature_weight=1.0, label_loss=lambda losses, _: losses["class"] + losses["size"])
    criterion(model(*batch), None).backward()
    assert criterion.last.feature > 0
    with pytest.raises(TypeError, match="output must hold a floating-point tensor that the model computed; got list"):
        criterion([], None)


def test_an_empty_batch_has_no_feature_term_and_the_loss_of_cross_entropy(build, batch):
    for smoothing in ("class_mean", "uniform", "none", "past"):
        model, criterion = build(
            smoothing=smoothing, num_samples=8 if smoothing == "past" else None, feature_weight=1.0
        )
        criterion(model(batch[0]), batch[1], index=torch.arange(8))
        model.zero_grad()
        empty = torch.zeros(0, dtype=torch.long)
        loss = criterion(model(batch[0][:0]), empty, index=empty)
        loss.backward()
        assert loss.isnan()
        assert criterion.last.feature == 0
        assert all(parameter.grad.abs().sum() == 0 for parameter in model.parameters())
        criterion(model(batch[0]), batch[1], index=torch.arange(8)).backward()
        assert criterion.last.feature > 0


@pytest.mark.parametrize("smoothing", ["class_mean", "uniform", "none", "past"])
def test_masked_classes_train_with_finite_gradients(build, batch, smoothing):
    model, criterion = build(smoothing=smoothing, num_samples=8 if smoothing == "past" else None)
    for shift in range(3):
        logits = model(batch[0])
        masked = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ((batch[1] + 1 + shift) % 10)[:, None], True)
        criterion(logits.masked_fill(masked, -float("inf")), batch[1], index=torch.arange(8)).backward()
        assert criterion.last.label.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_label_loss_beside_smoothing_is_an_error_that_says_so(make_net):
    model = sfr.SFRWrapper(make_net())
    with pytest.raises(ValueError, match="smoothing='class_mean' has no effect beside label_loss"):
        sfr.SFRLoss(model, smoothing="class_mean", label_loss=F.cross_entropy)


def test_a_gate_beside_a_label_loss_is_an_error_that_says_so(make_net):
    model = sfr.SFRWrapper(make_net())
    with pytest.raises(ValueError, match="gate='fitted' has no effect beside label_loss"):
        sfr.SFRLoss(model, gate="fitted", label_loss=F.cross_entropy)
    assert sfr.SFRLoss(model, gate="none", label_loss=F.cross_entropy).config.gate == "none"


@pytest.mark.parametrize("idle", [{"ignore_index": 3}, {"num_classes": 10}, {"config": {"ignore_index": 255}}])
def test_what_belongs_to_the_label_term_is_an_error_beside_a_label_loss(make_net, idle):
    with pytest.raises(ValueError, match=r"(ignore_index|num_classes)=.* has no effect beside label_loss"):
        sfr.SFRLoss(sfr.SFRWrapper(make_net()), label_loss=F.cross_entropy, **idle)


def test_the_near_name_of_a_misspelled_old_one_is_told_of_a_mapping_too(make_net):
    with pytest.raises(ValueError, match=r"wieght.*near names 'feature_weight'"):
        sfr.SFRLoss(sfr.SFRWrapper(make_net()), {"wieght": 1})


def test_pairs_may_be_an_array(make_net, batch):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()), pairs=np.array([[0, 2]]))
    assert criterion.config.pairs == ((0, 2),)
    criterion(criterion.model(batch[0]), batch[1])
    assert len(criterion.last.pairs) == 1


def test_an_auxiliary_loss_is_not_taken_for_logits(make_net, batch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, images):
            logits = self.net(images)
            return {"logits": logits, "aux_loss": logits.square().mean(dim=1)}

    model = sfr.SFRWrapper(Net())
    with pytest.raises(
        ValueError, match=r"criterion\(output\['logits'\], target\) \+ 0\.5 \* output\['aux_loss'\]\.mean"
    ):
        sfr.SFRLoss(model)(model(batch[0]), batch[1])


def test_the_parts_of_a_loss_are_printed_with_their_values(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model)
    criterion(model(batch[0]), batch[1])
    last = criterion.last
    assert repr(last) == (
        f"LossParts(label={last.label!r}, feature={last.feature!r}, weight=0.25, share={last.share!r})"
    )
