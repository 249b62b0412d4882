"""float32 is close to bfloat16 autocast: loss terms and the direction of the gradient."""

import torch

import sfr


def run(make_net, batch, enabled):
    torch.manual_seed(0)
    model = sfr.SFRWrapper(make_net(), weight=1.0)
    criterion = sfr.SFRLoss(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = criterion(model(batch[0]), batch[1])
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return loss.detach(), criterion.last.feature, gradient


def test_bfloat16_autocast_is_close_to_float32(make_net, batch):
    loss, feature, gradient = run(make_net, batch, enabled=False)
    loss16, feature16, gradient16 = run(make_net, batch, enabled=True)
    assert loss16.dtype == feature16.dtype == torch.float32
    torch.testing.assert_close(loss16, loss, rtol=0.01, atol=0)
    torch.testing.assert_close(feature16, feature, rtol=0.02, atol=0)
    assert torch.cosine_similarity(gradient, gradient16, dim=0) > 0.999
    assert not torch.equal(feature16, feature)  # autocast was really on
