"""float32 ~ float64 ~ bfloat16, by autocast and throughout: loss, feature term and gradient."""

import pytest
import torch

import sfr


def run(net, images, labels, autocast=False):
    model = sfr.SFRWrapper(net)
    criterion = sfr.SFRLoss(model, feature_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = criterion(model(images), labels)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return [loss.detach(), criterion.last.feature], gradient


@pytest.fixture
def expected(make_net, batch):
    return run(make_net(), *batch)


def test_float64_equals_float32(make_net, batch, assert_equal, expected):
    terms, gradient = run(make_net().double(), batch[0].double(), batch[1])
    assert {value.dtype for value in (*terms, gradient)} == {torch.float64}
    assert_equal([*terms, gradient], [value.double() for value in (*expected[0], expected[1])], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["autocast", "throughout"])
def test_bfloat16_is_close_to_float32(make_net, batch, assert_equal, expected, way):
    images, labels = batch
    if way == "autocast":
        terms, gradient = run(make_net(), images, labels, autocast=True)
        assert {value.dtype for value in terms} == {torch.float32}
    else:
        terms, gradient = run(make_net().bfloat16(), images.bfloat16(), labels)
    assert not torch.equal(terms[1].float(), expected[0][1])  # it was really another type
    assert_equal([term.float() for term in terms], expected[0], rtol=0.02)
    assert torch.cosine_similarity(gradient.float(), expected[1], dim=0) > 0.999
