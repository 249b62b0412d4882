"""A model in company: with several outputs, a teacher, a generator, other views or an attacker."""

import copy
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sfr


@pytest.fixture
def model(make_net):
    torch.manual_seed(0)
    return sfr.SFRWrapper(make_net())


# Several outputs, and some of the images


class Auxiliary(nn.Module):
    """In training, as Inception and GoogLeNet, it returns a named tuple of its logits and those of a shallow head."""

    outputs = namedtuple("InceptionOutputs", ["logits", "aux_logits"])

    def __init__(self, net):
        super().__init__()
        self.shallow, self.deep = net[:4], net[4:]
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def forward(self, x):
        x = self.shallow(x)
        return self.outputs(self.deep(x), self.aux(x)) if self.training else self.deep(x)


def test_auxiliary_logits_as_in_the_tutorial_of_finetuning_get_a_plain_loss(make_net, batch, step):
    model = sfr.SFRWrapper(Auxiliary(make_net()))
    criterion = sfr.SFRLoss(model)
    outputs, aux_outputs = model(batch[0])
    criterion(outputs, batch[1])
    with pytest.raises(RuntimeError, match=r"auxiliary classifiers, get a plain loss, F\.cross_entropy"):
        criterion(aux_outputs, batch[1])
    with pytest.raises(
        ValueError, match=r"auxiliary logits.*\+ 0\.5 \* F\.cross_entropy\(output\.aux_logits, target\)"
    ):
        criterion(model(batch[0]), batch[1])
    for _ in range(2):
        outputs, aux_outputs = model(batch[0])
        step(model, criterion, criterion(outputs, batch[1]) + 0.4 * F.cross_entropy(aux_outputs, batch[1]))
    model.eval()
    with torch.no_grad():
        assert criterion(model(batch[0]), batch[1]) == F.cross_entropy(model(batch[0]), batch[1])


def test_images_of_small_loss_as_in_coteaching_are_picked_before_or_by_a_loss_of_ones_own(model, batch, step):
    criterion = sfr.SFRLoss(model)
    for _ in range(2):
        logits = model(batch[0])
        picked = F.cross_entropy(logits, batch[1], reduction="none").argsort()[:5]
        step(model, criterion, criterion(logits[picked], batch[1][picked]))

    def of_small_loss(logits, target):
        losses = F.cross_entropy(logits, target, reduction="none")
        return losses[losses.argsort()[:5]].mean()

    criterion = sfr.SFRLoss(model, label_loss=of_small_loss)
    for _ in range(2):
        step(model, criterion, criterion(model(batch[0]), batch[1]))


def test_labelled_and_other_images_in_one_batch_as_in_fixmatch_share_the_feature_term(model, batch, step):
    criterion = sfr.SFRLoss(model)
    for _ in range(2):
        logits = model(torch.cat([batch[0], batch[0].flip(3), batch[0].roll(1, 3)]))
        labelled, weak, strong = logits.chunk(3)
        consistency = F.cross_entropy(strong, weak.detach().argmax(1))
        loss = criterion(labelled, batch[1]) + consistency
        torch.testing.assert_close(criterion.last.label, F.cross_entropy(labelled, batch[1]).detach())
        step(model, criterion, loss)


# Other networks beside the model


def test_a_student_has_the_feature_term_besides_its_teachers_loss(make_net, model, batch, step):
    teacher = make_net().eval()
    criterion = sfr.SFRLoss(model)
    for _ in range(2):
        with torch.no_grad():
            taught = teacher(batch[0])
        output = model(batch[0])
        distilled = F.kl_div(output.log_softmax(1), taught.log_softmax(1), log_target=True, reduction="batchmean")
        step(model, criterion, 0.5 * criterion(output, batch[1]) + 0.5 * distilled)


def test_a_mean_teacher_is_a_copy_in_training_mode_that_records_nothing(model, batch, step):
    criterion, teacher = sfr.SFRLoss(model), copy.deepcopy(model)
    for parameter in teacher.parameters():
        parameter.detach_()
    for _ in range(12):
        output, taught = model(batch[0]), teacher(batch[0].flip(3))
        step(model, criterion, criterion(output, batch[1]) + F.mse_loss(output, taught))
        with torch.no_grad():
            for mean, parameter in zip(teacher.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 0.1)


def test_two_views_of_byol_train_if_each_has_its_loss_before_the_next_forward(make_net, batch, regularized):
    torch.manual_seed(0)
    online = sfr.SFRWrapper(nn.Sequential(make_net(), nn.Linear(10, 10)))
    target = copy.deepcopy(online)[0].requires_grad_(False)

    def agreement(prediction, projection):
        return 2 - 2 * F.cosine_similarity(prediction, projection).mean()

    criterion = sfr.SFRLoss(online, label_loss=agreement)
    views = batch[0], batch[0].flip(3)
    with torch.no_grad():
        projections = [target(view) for view in views]
    loss = sum(criterion(online(view), other) for view, other in zip(views, reversed(projections), strict=True))
    loss.backward()
    regularized(criterion)
    assert criterion.step == 2

    predictions = [online(view) for view in views]
    with pytest.raises(RuntimeError, match="call the criterion right after each forward"):
        sum(criterion(p, other) for p, other in zip(predictions, reversed(projections), strict=True))


class MultiCrop(nn.Module):
    """DINO's wrapper: the backbone is called for the crops of each size, and the head for all of them."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops):
        sizes = sorted({crop.shape[-1] for crop in crops}, reverse=True)
        groups = [torch.cat([crop for crop in crops if crop.shape[-1] == size]) for size in sizes]
        return self.head(torch.cat([self.backbone(group) for group in groups]))


@pytest.mark.parametrize("sizes", [(16, 16), (16, 16, 10, 10)], ids=["one size", "two sizes"])
def test_crops_of_one_size_train_and_those_of_several_are_an_error(make_net, batch, regularized, sizes):
    net = MultiCrop(make_net()[:-1], nn.Linear(32, 10))
    model = sfr.SFRWrapper(net, stages=["backbone.1", "backbone.3", "backbone.5"])
    criterion = sfr.SFRLoss(model, label_loss=lambda output, teacher: -(teacher * output.log_softmax(1)).sum(1).mean())
    crops = [F.interpolate(batch[0], size) for size in sizes]
    teacher = torch.randn(8 * len(crops), 10).softmax(1)
    if len(set(sizes)) == 1:
        criterion(model(crops), teacher).backward()
        regularized(criterion)
    else:
        with pytest.raises(RuntimeError, match="fired twice in one forward"):
            model(crops)


@pytest.mark.filterwarnings("error")
def test_a_critic_trains_with_features_and_passes_gradients_to_its_generator(make_net, regularized):
    torch.manual_seed(0)
    critic = sfr.SFRWrapper(make_net(classes=1))
    generator = nn.Sequential(nn.Linear(4, 3 * 16 * 16), nn.Unflatten(1, (3, 16, 16)))
    loss = nn.BCEWithLogitsLoss()
    criterion = sfr.SFRLoss(critic, label_loss=loss)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (critic, generator)]
    real, ones, zeros = torch.randn(8, 3, 16, 16), torch.ones(8, 1), torch.zeros(8, 1)
    for _ in range(12):
        fake = generator(torch.randn(8, 4))
        optimizers[0].zero_grad()
        criterion(critic(real), ones).backward()
        regularized(criterion)
        criterion(critic(fake.detach()), zeros).backward()
        regularized(criterion)
        optimizers[0].step()
        optimizers[1].zero_grad()
        loss(critic(fake), ones).backward()
        assert generator[0].weight.grad.any()
        optimizers[1].step()
    assert criterion.step == 24


def test_a_frozen_classifier_guides_an_optimized_image_without_recording(model, batch):
    model.eval().requires_grad_(False)
    image = batch[0].clone().requires_grad_()
    for _ in range(12):
        F.cross_entropy(model(image), batch[1]).backward()
    assert image.grad.any()


def test_adversarial_training_attacks_the_plain_loss_and_trains_with_features(model, batch, step):
    """As in PGD: the attack asks the model several times before the forward that trains."""
    criterion = sfr.SFRLoss(model)
    for _ in range(2):
        x = batch[0].clone()
        for _ in range(3):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(x), batch[1]), x)
            x = x + 0.01 * slope.sign()
        step(model, criterion, criterion(model(x.detach()), batch[1]))


def test_an_attack_on_the_criterion_itself_trains_too(model, batch, step):
    criterion = sfr.SFRLoss(model)
    for _ in range(2):
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(criterion(model(x), batch[1]), x)
        step(model, criterion, criterion(model((x + 0.01 * slope.sign()).detach()), batch[1]))
