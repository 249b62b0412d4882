"""Steps of another shape: losses of two labels, several backwards, closures, gradients of gradients."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

import sfr


@pytest.fixture
def model(make_net):
    torch.manual_seed(0)
    return sfr.SFRWrapper(make_net())


def plain_of(make_net, model):
    plain = make_net()
    plain.load_state_dict(model.state_dict())
    return plain.eval()


# MixUp and CutMix, as their authors write them


def mixup_data(x, y, alpha=1.0):
    lam = np.random.beta(alpha, alpha)
    index = torch.randperm(x.size(0))
    return lam * x + (1 - lam) * x[index, :], y, y[index], lam


def mixup_criterion(criterion, pred, y_a, y_b, lam):
    return lam * criterion(pred, y_a) + (1 - lam) * criterion(pred, y_b)


def cutmix_data(x, y):
    lam, index = np.random.beta(1.0, 1.0), torch.randperm(x.size(0))
    width = int(x.size(-1) * np.sqrt(1 - lam))
    x = x.clone()
    x[:, :, :width, :width] = x[index, :, :width, :width]
    return x, y, y[index], 1 - width * width / (x.size(-1) * x.size(-2))


def cutmix_criterion(criterion, output, target_a, target_b, lam):
    return criterion(output, target_a) * lam + criterion(output, target_b) * (1.0 - lam)


@pytest.mark.parametrize(
    ("mix", "mixed_loss"),
    [(mixup_data, mixup_criterion), (cutmix_data, cutmix_criterion)],
    ids=["mixup", "cutmix"],
)
def test_a_loss_of_two_labels_has_the_mixed_label_term_and_one_feature_term(
    make_net, model, batch, step, mix, mixed_loss
):
    np.random.seed(0)
    criterion = sfr.SFRLoss(model, gate="none")
    for count in range(1, 4):
        inputs, targets_a, targets_b, lam = mix(*batch)
        outputs = model(inputs)
        loss = mixed_loss(criterion, outputs, targets_a, targets_b, lam)
        label = mixed_loss(F.cross_entropy, outputs.detach(), targets_a, targets_b, lam)
        torch.testing.assert_close(loss.detach(), label + criterion.last.weight * criterion.last.feature)
        step(model, criterion, loss)
        assert criterion.step == count
    model.eval()
    with torch.no_grad():
        assert criterion(model(batch[0]), batch[1]) == F.cross_entropy(plain_of(make_net, model)(batch[0]), batch[1])


# Several forwards and backwards a step


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization as in the common implementation: up to the worst point near by, and back."""

    def __init__(self, params, rho=0.05):
        super().__init__(params, {"rho": rho})

    @torch.no_grad()
    def first_step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad * (self.defaults["rho"] / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"] - 0.1 * p.grad)
        self.zero_grad()


def test_both_backwards_of_sharpness_aware_minimization_have_the_feature_term(model, batch, regularized):
    optimizer, criterion = SAM(model.parameters()), sfr.SFRLoss(model)
    for _ in range(2):
        loss = criterion(model(batch[0]), batch[1])
        loss.backward()
        regularized(criterion)
        optimizer.first_step()
        climbed = criterion(model(batch[0]), batch[1])
        climbed.backward()
        regularized(criterion)
        optimizer.second_step()
        assert climbed > loss
    assert criterion.step == 4


def test_every_evaluation_of_lbfgs_has_the_feature_term(model, batch, regularized):
    optimizer, criterion = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4), sfr.SFRLoss(model)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(batch[0]), batch[1])
        loss.backward()
        regularized(criterion)
        losses.append(loss.item())
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert criterion.step == len(losses) > 4
    assert losses[-1] < losses[0]


def test_a_step_scaled_for_half_precision_has_the_feature_term(model, batch, regularized):
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), sfr.SFRLoss(model)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        regularized(criterion)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


# Gradients of gradients


def test_a_penalty_on_the_gradient_of_the_loss_is_differentiated_exactly(make_net, batch):
    images, labels = batch[0].double(), batch[1]
    smooth = nn.Sequential(*(nn.Tanh() if isinstance(module, nn.ReLU) else module for module in make_net())).double()
    model = sfr.SFRWrapper(smooth)
    # What is detached has no derivative here either.
    criterion = sfr.SFRLoss(model, feature_weight=5.0, detach_deep=False, gate="none")

    def penalty():
        x = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(criterion(model(x), labels), x, create_graph=True)
        return 1000 * slope.square().sum()

    weight = model[0].weight
    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction, values = torch.randn_like(weight), []
    for distance in (1e-6, -1e-6):
        with torch.no_grad():
            weight += distance * direction
        values.append(penalty().item())
        with torch.no_grad():
            weight -= distance * direction
    assert criterion.last.feature > 0
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_a_penalty_on_the_gradient_trains(model, batch, step):
    criterion = sfr.SFRLoss(model)
    for _ in range(2):
        x = batch[0].clone().requires_grad_()
        loss = criterion(model(x), batch[1])
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        step(model, criterion, loss + slope.square().sum())


def test_an_inner_step_of_meta_learning_passes_its_gradient_on(model, batch, regularized):
    criterion, parameters = sfr.SFRLoss(model), dict(model.named_parameters())
    inner = criterion(functional_call(model, parameters, (batch[0],)), batch[1])
    slopes = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
    adapted = {name: p - 0.1 * slope for (name, p), slope in zip(parameters.items(), slopes, strict=True)}
    criterion(functional_call(model, adapted, (batch[0],)), batch[1]).backward()
    regularized(criterion)
    assert criterion.step == 2
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("watched", [False, True], ids=["first forward", "later"])
@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap"])
def test_a_transform_of_torch_func_is_an_error_that_says_what_works(model, batch, step, transform, watched):
    criterion = sfr.SFRLoss(model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if watched:
        step(model, criterion, criterion(model(batch[0]), batch[1]))

    def of_the_batch(parameters, x, y, loss=criterion):
        return loss(functional_call(model, parameters, (x,)), y)

    def of_each(parameters, x, y, loss=criterion):
        return of_the_batch(parameters, x[None], y[None], loss)

    transforms = {"grad": grad(of_the_batch), "jacrev": jacrev(of_the_batch), "vmap": vmap(of_each, (None, 0, 0))}
    with pytest.raises(RuntimeError, match=r"inside a transform of torch\.func .* torch\.autograd\.grad"):
        transforms[transform](parameters, *batch)
    slopes = vmap(grad(lambda *args: of_each(*args, F.cross_entropy)), (None, 0, 0))(parameters, *batch)
    assert slopes["0.weight"].shape == (8, 8, 3, 3, 3)
    step(model, criterion, criterion(model(batch[0]), batch[1]))


@pytest.mark.parametrize("way", ["no_grad", "disabled", "both", "evaluation"])
def test_a_forward_without_features_may_come_between_the_model_and_the_criterion(make_net, batch, way):
    """As of pseudo-labels, or of a consistency term: the features of the training forward are still there."""
    images, labels = batch
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model)
    logits = model(images)
    expected = criterion(logits, labels)
    for _ in range(2):
        logits = model(images)
        with (
            torch.set_grad_enabled(way == "disabled"),
            model.disable() if "dis" in way or way == "both" else nullcontext(),
        ):
            model.train(way != "evaluation")
            other = model(images.flip(3))
            model.train()
        torch.testing.assert_close(criterion(logits, labels), expected)
        assert criterion.last.feature > 0
        with pytest.raises(RuntimeError, match="no features are recorded"):
            criterion(other + 0 * logits, labels)


def test_logits_of_a_forward_without_features_get_none_of_another(make_net, batch):
    images, labels = batch
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model)
    logits = model(images)
    with model.disable():
        other = model(images.flip(3))
    with pytest.raises(RuntimeError, match="do not come from the last training forward"):
        criterion(other, labels)
    del logits
