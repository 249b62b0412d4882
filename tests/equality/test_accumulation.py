"""One big batch = the same batch accumulated from halves."""

import pytest
import torch

import sfr

RUNNING_MEANS = (
    "the class means move between the halves, so the second half is smoothed by what the first one said: "
    "a criterion cannot know that no optimizer step lies between two calls"
)


def gradients(model, criterion, images, labels, parts):
    model.zero_grad()
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        (criterion(model(x), y) / parts).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"smoothing": "none"}, id="hard labels"),
        pytest.param({"smoothing": "uniform", "alpha": 0.2}, id="uniform"),
        pytest.param({"update": "epoch"}, id="class means by epoch"),
        pytest.param({}, id="running class means", marks=pytest.mark.xfail(strict=True, reason=RUNNING_MEANS)),
    ],
)
def test_accumulated_halves_give_the_gradient_of_the_whole(make_net, batch, options):
    images, labels = batch[0], torch.zeros(8, dtype=torch.long)
    model = sfr.SFRWrapper(make_net(), example_input=images, weight=0.5, **options)
    with torch.no_grad():
        list(model.parameters())[-1][0] += 5.0  # class 0 is predicted, so that its mean moves
    whole = gradients(model, sfr.SFRLoss(model), images, labels, parts=1)
    halves = gradients(model, sfr.SFRLoss(model), images, labels, parts=2)
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-6)
