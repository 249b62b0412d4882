"""DoGo against plain loops, finite differences, the authors' convention and one process; its edges and its networks."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torchvision import models

from sfr.pretrain import DoGoLoss, TwoViewNetwork, encoder_of, nt_xent, similarity_kl, simsiam
from sfr.pretrain.dogo import FIELDS

OBJECTIVES = ["simclr", "simsiam"]


def random_views(objective, batch=5, width=4, dtype=torch.float64):
    """Embeddings as a network gives them, leaves of their own graph."""
    return tuple(torch.randn(batch, width, dtype=dtype, requires_grad=True) for _ in FIELDS[objective])


def cosine(x, y):
    return sum(p * q for p, q in zip(x, y, strict=True)) / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))


def nt_xent_by_loops(a, b, temperature):
    views, count = a.tolist() + b.tolist(), len(a)
    total = 0.0
    for i, anchor in enumerate(views):
        terms = {k: math.exp(cosine(anchor, other) / temperature) for k, other in enumerate(views) if k != i}
        total -= math.log(terms[(i + count) % (2 * count)] / sum(terms.values()))
    return total / len(views)


def distribution_by_loops(a, b, temperature):
    rows = []
    for x in a.tolist():
        terms = [math.exp(cosine(x, y) / temperature) for y in b.tolist()]
        rows.append([term / sum(terms) for term in terms])
    return rows


def kl_by_loops(own, peer, temperature):
    rows = zip(distribution_by_loops(*peer, temperature), distribution_by_loops(*own, temperature), strict=True)
    return sum(q * math.log(q / p) for target, row in rows for q, p in zip(target, row, strict=True)) / len(own[0])


def simsiam_by_loops(a, b, predicted_a, predicted_b):
    pairs = [*zip(predicted_a.tolist(), b.tolist(), strict=True), *zip(predicted_b.tolist(), a.tolist(), strict=True)]
    return -sum(cosine(prediction, projection) for prediction, projection in pairs) / len(pairs)


def gradients_of(loss, *embeddings):
    return torch.autograd.grad(loss, embeddings, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_is_the_sum_that_the_formula_names(temperature):
    a, b = random_views("simclr")
    assert nt_xent(a, b, temperature).item() == pytest.approx(nt_xent_by_loops(a, b, temperature), rel=1e-9)


def test_simsiam_is_the_mean_of_both_predictions():
    views = random_views("simsiam")
    assert simsiam(*views).item() == pytest.approx(simsiam_by_loops(*views), rel=1e-9)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_similarity_kl_is_the_divergence_from_the_peers_rows(temperature):
    own, peer = random_views("simclr", width=4), random_views("simclr", width=7)
    value = similarity_kl(own, peer, temperature).item()
    assert value == pytest.approx(kl_by_loops(own, peer, temperature), rel=1e-9)


def test_the_two_losses_are_own_term_plus_weighted_divergence():
    first, second = random_views("simclr", width=4), random_views("simclr", width=7)
    criterion = DoGoLoss(temperature=0.3, similarity_temperature=0.2, weights=(0.5, 2.0))
    of_first, of_second = criterion(first, second)
    assert of_first.item() == pytest.approx(nt_xent_by_loops(*first, 0.3) + 0.5 * kl_by_loops(first, second, 0.2))
    assert of_second.item() == pytest.approx(nt_xent_by_loops(*second, 0.3) + 2.0 * kl_by_loops(second, first, 0.2))


def test_simsiam_holds_own_predictions_against_the_peers_projections():
    first, second = random_views("simsiam", width=4), random_views("simsiam", width=7)
    of_first, of_second = DoGoLoss("simsiam", weights=(1.0, 1.0))(first, second)
    assert of_first.item() == pytest.approx(simsiam_by_loops(*first) + kl_by_loops(first[2:], second[:2], 0.1))
    assert of_second.item() == pytest.approx(simsiam_by_loops(*second) + kl_by_loops(second[2:], first[:2], 0.1))


def test_the_parts_of_the_last_loss_add_up():
    criterion = DoGoLoss(weights=(0.5, 2.0))
    losses = criterion(random_views("simclr"), random_views("simclr"))
    for name, weight, loss in zip(("first", "second"), criterion.weights, losses, strict=True):
        assert (criterion.last[f"ssl_{name}"] + weight * criterion.last[f"kl_{name}"]).item() == loss.item()
    assert not any(part.requires_grad for part in criterion.last.values())


def test_default_weight_is_the_authors_100_at_their_batch_of_256():
    own, peer = (random_views("simclr", batch=256, width=8) for _ in range(2))
    student, teacher = (F.softmax(F.cosine_similarity(a[:, None], b[None], dim=2) / 0.1, dim=1) for a, b in (own, peer))
    authors = 100 * F.kl_div(student.log(), teacher, reduction="none").mean()  # over all 256 x 256 entries
    ours = DoGoLoss().weights[0] * similarity_kl(own, peer)
    assert ours.item() == pytest.approx(authors.item(), rel=1e-9)
    assert round(DoGoLoss().weights[0], 2) == 0.39


def test_gradients_are_those_of_finite_differences():
    a, b = random_views("simclr")
    assert gradcheck(nt_xent, (a, b))
    _, _, *predictions = random_views("simsiam")
    assert gradcheck(lambda p, q: simsiam(a.detach(), b.detach(), p, q), predictions)
    peer = random_views("simclr", width=7)
    assert gradcheck(lambda x, y: similarity_kl((x, y), [view.detach() for view in peer]), (a, b))


def test_simsiam_projections_receive_no_gradient_from_their_own_loss():
    a, b, predicted_a, predicted_b = random_views("simsiam")
    loss = simsiam(a, b, predicted_a, predicted_b)
    assert gradients_of(loss, a, b) == (None, None)
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of(loss, predicted_a, predicted_b))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_loss_reaches_its_own_network_only(objective):
    first, second = random_views(objective, width=4), random_views(objective, width=7)
    of_first, of_second = DoGoLoss(objective, weights=(1.0, 1.0))(first, second)
    assert all(gradient is None for gradient in gradients_of(of_first, *second))
    assert all(gradient is None for gradient in gradients_of(of_second, *first))
    for loss, own in ((of_first, first), (of_second, second)):
        assert all(gradient.abs().sum() > 0 for gradient in gradients_of(loss, *own[-2:]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_alone_and_weight_zero_are_the_self_supervised_loss(objective):
    first, second = random_views(objective), random_views(objective)
    plain = nt_xent(*first) if objective == "simclr" else simsiam(*first)
    criterion = DoGoLoss(objective, weights=(0.0, 0.0))
    torch.testing.assert_close(criterion(first), plain, rtol=0, atol=0)
    assert set(criterion.last) == {"ssl_first"}
    torch.testing.assert_close(criterion(first, second)[0], plain, rtol=0, atol=0)


def test_equal_networks_have_nothing_to_teach_each_other():
    views = random_views("simclr")
    criterion = DoGoLoss()
    criterion(views, tuple(3 * view for view in views))  # cosines know no length
    assert criterion.last["kl_first"].item() == pytest.approx(0, abs=1e-12)


def test_nt_xent_of_one_image_is_an_error_and_simsiam_of_one_is_finite():
    with pytest.raises(ValueError, match="at least 2 images; got 1"):
        DoGoLoss()(random_views("simclr", batch=1), random_views("simclr", batch=1))
    losses = DoGoLoss("simsiam")(random_views("simsiam", batch=1), random_views("simsiam", batch=1))
    assert all(loss.isfinite() for loss in losses)


def test_collapsed_embeddings_give_the_loss_of_a_guess():
    views = [torch.ones(4, 3, requires_grad=True) for _ in range(2)]
    loss, _ = DoGoLoss()(views, random_views("simclr", batch=4))
    assert nt_xent(*views).item() == pytest.approx(math.log(7))
    assert all(gradient.isfinite().all() for gradient in gradients_of(loss, *views))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_vectors_of_zeros_give_finite_losses_and_bounded_gradients(objective):
    zeros = tuple(torch.zeros(4, 3, requires_grad=True) for _ in FIELDS[objective])
    random = random_views(objective, batch=4, dtype=torch.float32)
    losses = DoGoLoss(objective)(zeros, random)
    assert all(loss.isfinite() for loss in losses)
    for gradient in gradients_of(losses[0], *zeros[-2:]):
        assert gradient.abs().max() < 100


def test_tiny_and_huge_embeddings_have_the_loss_of_ordinary_ones():
    a, b = random_views("simclr", dtype=torch.float32)
    for factor in (1e-12, 1e12):
        torch.testing.assert_close(nt_xent(factor * a, factor * b), nt_xent(a, b), rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_float32_inside_autocast(objective):
    first, second = (random_views(objective, batch=16, dtype=torch.bfloat16) for _ in range(2))
    exact = DoGoLoss(objective)([view.double() for view in first], [view.double() for view in second])
    with torch.autocast("cpu", torch.bfloat16):
        losses = DoGoLoss(objective)(first, second)
    assert {loss.dtype for loss in losses} == {torch.float32}
    torch.testing.assert_close(torch.stack(losses).double(), torch.stack(exact), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((4, 3), None, r"first must be a tuple \(projection a, projection b\) for objective='simclr'; got Tensor"),
        ([(4, 3)], None, "got 1 of them"),
        ([(4, 3)] * 4, None, "got 4 of them"),
        ([(4, 3), (4, 2)], None, r"first, projection a \(4, 3\), first, projection b \(4, 2\)"),
        ([(4, 3), (5, 3)], None, "one shape"),
        ([(4, 3, 1)] * 2, None, "one shape"),
        ([(0, 3)] * 2, None, "B and D at least 1"),
        ([(4, 3)] * 2, [(5, 3)] * 2, r"both networks must be given the same images; got .*4.*5"),
        ([(4, 3)] * 2, [(4, 3), (4, 2)], r"second, projection b \(4, 2\)"),
    ],
)
def test_embeddings_that_do_not_fit_are_named(first, second, message):
    given = [
        torch.zeros(shapes) if isinstance(shapes, tuple) else [torch.zeros(shape) for shape in shapes]
        for shapes in (first, second)
        if shapes is not None
    ]
    with pytest.raises(ValueError, match=message):
        DoGoLoss()(*given)


def test_pure_functions_check_their_arguments_too():
    views = random_views("simclr")
    with pytest.raises(ValueError, match="own and peer must hold the same images; got 5 and 6"):
        similarity_kl(views, random_views("simclr", batch=6))
    with pytest.raises(ValueError, match="peer must be the embeddings of two views; got 4"):
        similarity_kl(views, random_views("simsiam"))
    with pytest.raises(TypeError, match=r"b must be a floating tensor; got torch\.int64"):
        nt_xent(views[0], torch.ones(5, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="predicted_b must be a floating tensor; got NoneType"):
        simsiam(*views, views[0], None)
    with pytest.raises(ValueError, match="temperature must be finite and at least"):
        nt_xent(*views, temperature=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "byol"}, "objective must be one of 'simclr', 'simsiam'; got 'byol'"),
        ({"temperature": 0}, "temperature must"),
        ({"similarity_temperature": -0.1}, "similarity_temperature must"),
        ({"weights": (1.0, -1.0)}, "weights must be finite and at least 0; got -1.0"),
        ({"weights": (1.0,)}, "weights must be two numbers"),
        ({"weights": 1.0}, r"weights must be two numbers, one per network; got 1\.0"),
    ],
)
def test_wrong_options_are_errors_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        DoGoLoss(**arguments)


CLASSIFIERS = {
    "resnet18": lambda: models.resnet18(),
    "mobilenet_v2": lambda: models.mobilenet_v2(),
    "vit": lambda: models.VisionTransformer(32, 8, 2, 2, 16, 32),
    "timm resnet": lambda: timm.create_model("resnet10t"),
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_encoder_gives_what_the_head_gets_and_leaves_the_model_alone(name):
    model = CLASSIFIERS[name]().eval()
    images = torch.randn(2, 3, 32, 32)
    before, names = model(images), list(model.state_dict())
    head = next(module for _, module in reversed(list(model.named_modules())) if isinstance(module, nn.Linear))
    encoder, dim = encoder_of(model)
    features = encoder(images)
    assert features.shape == (2, dim)
    torch.testing.assert_close(head(features), before)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    assert list(model.state_dict()) == names
    assert {id(weight) for weight in encoder.parameters()} < {id(weight) for weight in model.parameters()}


def test_training_the_encoder_trains_the_model(make_net):
    model = make_net()
    encoder, dim = encoder_of(model)
    assert dim == 32
    own = {id(parameter) for parameter in encoder.parameters()}
    assert own == {id(parameter) for parameter in model.parameters()} - {id(p) for p in model[-1].parameters()}


def test_a_head_can_be_named_and_need_not_be_linear():
    model = models.squeezenet1_1().eval()
    with pytest.raises(ValueError, match=r"SqueezeNet has no nn\.Linear inside: name its head"):
        encoder_of(model)
    encoder, dim = encoder_of(model, head="classifier")
    assert dim == 512
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 512 * 3 * 3)
    encoder, dim = encoder_of(model, head="classifier.1")
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 512)


def test_heads_that_are_not_there_or_have_no_width_are_errors(make_net):
    with pytest.raises(ValueError, match="the model has no head 'fcc'; near names: fc"):
        encoder_of(models.resnet18(), head="fcc")
    with pytest.raises(ValueError, match=r"head '1' holds neither nn\.Linear nor nn\.Conv2d"):
        encoder_of(make_net(), head="1")


def test_features_of_another_shape_name_the_way_out():
    network = TwoViewNetwork(models.squeezenet1_1(), head="classifier")
    with pytest.raises(ValueError, match=r"gives shape \(2, 4608\), not \(2, 512\): name the layer"):
        network(*torch.randn(2, 2, 3, 64, 64))


@pytest.mark.parametrize(("objective", "widths"), [("simclr", [128] * 2), ("simsiam", [2048] * 4)])
def test_a_pair_of_networks_of_two_sizes_trains(make_net, objective, widths):
    small, large = TwoViewNetwork(make_net(), objective), TwoViewNetwork(models.resnet18(), objective)
    images = torch.randn(4, 4, 3, 32, 32)
    outputs = small(*images[:2])
    assert [output.shape[1] for output in outputs] == widths
    sum(DoGoLoss(objective)(outputs, large(*images[2:]))).backward()
    for network in (small, large):
        assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
