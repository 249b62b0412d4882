"""Several forwards for one step, and stages that are shared, repeated or written into."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sfr


@pytest.fixture
def model(make_net, batch):
    return sfr.SFRWrapper(make_net(), example_input=batch[0])


def criterion_of(model, **switches):
    return sfr.SFRLoss(model, **{"feature_weight": 1.0, "detach_deep": False, **switches})


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_two_views_each_with_the_criterion_add_their_gradients(model, batch):
    criterion = criterion_of(model)
    views, labels = (batch[0], batch[0].flip(3)), batch[1]
    together = gradients(model, sum(criterion(model(view), labels) for view in views))
    apart = [gradients(model, criterion(model(view), labels)) for view in views]
    torch.testing.assert_close(together, [a + b for a, b in zip(*apart, strict=True)])


def test_views_of_other_sizes_train(model, batch):
    criterion = criterion_of(model)
    views = batch[0], nn.functional.interpolate(batch[0], size=(10, 12))
    sum(criterion(model(view), batch[1]) for view in views).backward()
    assert criterion.last.feature > 0


VIEWS = {
    "first": lambda first, second: first,
    "concatenated": lambda first, second: torch.cat([first, second])[::2],
    "averaged": lambda first, second: (first + second) / 2,
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
def test_logits_of_an_earlier_forward_even_in_part_are_an_error(model, batch, views, compiled):
    """The features are those of the last forward only: the loss of both would silently lack those of the first."""
    torch._dynamo.reset()
    forward = torch.compile(model, backend="eager") if compiled else model
    criterion = criterion_of(model)
    for _ in range(2):
        logits = views(forward(batch[0]), forward(batch[0].flip(3)))
        with pytest.raises(RuntimeError, match="call the criterion right after each forward"):
            criterion(logits, batch[1])
    criterion(forward(batch[0]), batch[1]).backward()


def test_a_forward_whose_output_goes_elsewhere_is_no_error(model, batch):
    criterion = criterion_of(model)
    other = model(batch[0].flip(3))
    logits = model(batch[0])
    (criterion(logits, batch[1]) + (logits - other).square().mean()).backward()
    assert not model._sfr.recorder.unused


def test_two_models_in_one_loss_keep_their_features_apart(make_net, batch):
    models = [sfr.SFRWrapper(make_net(), example_input=batch[0]) for _ in range(2)]
    criteria = [criterion_of(model) for model in models]
    logits = [model(batch[0]) for model in models]
    losses = [criterion(output, batch[1]) for criterion, output in zip(criteria, logits, strict=True)]
    alone = [criterion_of(model)(model(batch[0]), batch[1]) for model in models]
    assert losses == alone
    assert losses[0] != losses[1]


def test_the_backward_may_come_after_the_next_forward(model, batch):
    criterion = criterion_of(model)
    loss = criterion(model(batch[0]), batch[1])
    expected = gradients(model, criterion(model(batch[0]), batch[1]))
    model(batch[0].flip(3))
    torch.testing.assert_close(gradients(model, loss), expected)


class Shared(nn.Module):
    """Uses one convolution's weight in two stages."""

    def __init__(self, copies=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.first, self.second = (nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()) for _ in range(2))
        self.second[0].weight = self.first[0].weight
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


def test_stages_that_share_a_weight_train_it_from_both(batch):
    model = sfr.SFRWrapper(Shared(), stages=["stem", "first", "second"])
    criterion = criterion_of(model)
    criterion(model(batch[0]), batch[1]).backward()
    assert criterion.last.feature > 0
    assert len(list(model.parameters())) == len(list(Shared().parameters())) == 7
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class Repeated(nn.Module):
    """Calls one block three times, and a probe after each."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2)
        self.after = nn.ModuleList(nn.Identity() for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for probe in self.after:
            x = probe(self.block(x))
        return self.last(x).mean((2, 3))


def test_a_stage_called_several_times_is_an_error_and_the_modules_around_it_work(batch):
    model = sfr.SFRWrapper(Repeated(), stages=["stem", "block", "last"])
    with pytest.raises(RuntimeError, match=r"stage 'block' fired twice.*Tap the modules around it"):
        model(batch[0])
    model = sfr.SFRWrapper(model.unwrap(), stages=["stem", "after.0", "after.2", "last"])
    criterion = criterion_of(model)
    criterion(model(batch[0]), batch[1]).backward()
    assert len(criterion.last.pairs) == 6


def written_into(inplace):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


@pytest.mark.parametrize("stages", [["0", "2"], ["0", "3"], ["1", "4"]])
def test_a_stage_that_is_written_into_counts_as_it_was_left(batch, stages):
    """An in-place ReLU after the stage makes its feature the ReLU's output, with the gradient of that."""
    torch.manual_seed(0)
    model = sfr.SFRWrapper(written_into(inplace=True), stages=stages)
    torch.manual_seed(0)
    after = {"0": "1", "3": "4"}
    plain = sfr.SFRWrapper(written_into(inplace=False), stages=[after.get(name, name) for name in stages])
    losses = [criterion_of(each)(each(batch[0]), batch[1]) for each in (model, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients(model, losses[0]), gradients(plain, losses[1]))


def test_integer_inputs_and_a_frozen_stage_train(batch):
    net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 6, 10))
    net[0].requires_grad_(False)
    model = sfr.SFRWrapper(net, stages=["0", "2"])
    criterion = criterion_of(model)
    criterion(model(torch.randint(0, 50, (8, 6))), batch[1]).backward()
    assert criterion.last.feature > 0
    assert net[1].weight.grad.abs().sum() > 0


def test_each_of_two_labels_for_the_same_logits_is_one_loss_with_mixed_targets(model, batch):
    criterion = criterion_of(model)
    first, second = batch[1], batch[1].roll(1)
    logits = model(batch[0])
    mixed = criterion(logits, 0.3 * F.one_hot(first, 10).float() + 0.7 * F.one_hot(second, 10).float())
    expected = gradients(model, mixed)
    logits = model(batch[0])
    loss = 0.3 * criterion(logits, first) + 0.7 * criterion(logits, second)
    torch.testing.assert_close(loss, mixed)
    torch.testing.assert_close(gradients(model, loss), expected)
    assert criterion.step == 2
    assert criterion.last.feature > 0


def test_the_two_labels_share_a_step_of_every_schedule_and_both_count(make_net, batch):
    model = sfr.SFRWrapper(make_net(), example_input=batch[0])
    moving = {"feature_weight": sfr.Ramp(0, 0.2, steps=10), "alpha": sfr.Ramp(0, 1, steps=10)}
    criterion = criterion_of(model, smoothing="class_mean", **moving)
    for step in range(1, 4):
        logits = model(batch[0])
        predicted = logits.argmax(dim=1)
        for label in (predicted, predicted.roll(1)):
            criterion(logits, label)
            assert criterion.step == criterion.labels.step == step
            assert criterion.last.weight == pytest.approx(0.2 * step / 10)
    assert criterion.labels.counts.sum() >= 3 * 8


def test_the_same_logits_after_another_forward_are_an_error(model, batch):
    criterion = criterion_of(model)
    logits = model(batch[0])
    criterion(logits, batch[1])
    model(batch[0])
    with pytest.raises(RuntimeError, match="do not come from the last training forward"):
        criterion(logits, batch[1])
    with pytest.raises(RuntimeError, match="only with the very same logits and before the next forward"):
        criterion(logits, batch[1])


def test_other_logits_of_the_same_forward_and_another_criterion_get_no_features_twice(model, batch):
    criterion, other = criterion_of(model), criterion_of(model)
    logits = model(batch[0])
    criterion(logits, batch[1])
    for again in (lambda: criterion(logits * 2, batch[1]), lambda: other(logits, batch[1])):
        with pytest.raises(RuntimeError, match="no features are recorded"):
            again()


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("calls", [1, 2])
def test_nothing_is_kept_once_loss_and_logits_are_gone(model, batch, calls, backward):
    criterion = criterion_of(model)
    logits = model(batch[0])
    features = [weakref.ref(feature) for feature in model._sfr.recorder.features.values()]
    loss = sum(criterion(logits, batch[1]) for _ in range(calls))
    assert not model._sfr.recorder.features
    gc.disable()
    try:
        if backward:
            loss.backward()
            assert not any(feature() is not None for feature in features)  # with the logits still there
        del loss, logits
        assert model._sfr.recorder._result is None
        assert not any(feature() is not None for feature in features)
    finally:
        gc.enable()


def test_a_copy_between_the_two_labels_has_nothing_of_the_original(model, batch):
    criterion = criterion_of(model)
    logits = model(batch[0])
    criterion(logits, batch[1])
    _, twin = copy.deepcopy((model, criterion))
    with pytest.raises(RuntimeError, match="no features are recorded"):
        twin(logits, batch[1])
    criterion(logits, batch[1]).backward()
