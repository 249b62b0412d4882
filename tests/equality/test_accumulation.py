"""One big batch = the same batch accumulated from parts."""

import pytest
import torch

import sfr

RUNNING_MEANS = (
    "the class means move between the parts, so that a later part is smoothed by what an earlier one said: "
    "a criterion cannot know that no optimizer step lies between two calls"
)


def gradients(model, images, labels, parts, switches):
    model.zero_grad()
    criterion = sfr.SFRLoss(model, feature_weight=0.5, **switches)
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        (criterion(model(x), y) / parts).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize(
    "switches",
    [
        pytest.param({"smoothing": "none"}, id="hard labels"),
        pytest.param({"smoothing": "uniform", "alpha": 0.2}, id="uniform"),
        pytest.param({"smoothing": "class_mean", "update": "epoch"}, id="class means by epoch"),
        pytest.param(
            {"smoothing": "class_mean"},
            id="running class means",
            marks=pytest.mark.xfail(strict=True, reason=RUNNING_MEANS),
        ),
    ],
)
def test_accumulated_parts_give_the_gradient_of_the_whole(make_net, batch, assert_equal, switches, parts):
    images, labels = batch[0], torch.zeros(8, dtype=torch.long)
    model = sfr.SFRWrapper(make_net(), example_input=images)
    with torch.no_grad():
        list(model.parameters())[-1][0] += 5.0  # class 0 is predicted, so that its mean moves
    whole = gradients(model, images, labels, 1, switches)
    assert_equal(gradients(model, images, labels, parts, switches), whole, rtol=1e-4, atol=1e-6)
