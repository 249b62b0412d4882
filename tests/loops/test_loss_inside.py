"""Models that compute their loss themselves, of the shape of ultralytics' detectors and their trainer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sfr


class Detect(nn.Module):
    """Takes the maps of three depths; what it returns depends on the mode."""

    def __init__(self, widths, outputs):
        super().__init__()
        self.cv = nn.ModuleList(nn.Conv2d(width, outputs, 1) for width in widths)

    def forward(self, maps):
        found = [conv(x) for conv, x in zip(self.cv, maps, strict=True)]
        if self.training:
            return found
        return torch.cat([x.flatten(2) for x in found], 2), found


class Conv(nn.Module):
    """A convolution with its normalisation, which fuse() puts into it."""

    def __init__(self, width, out, stride=2):
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class DetectionLoss:
    """Made from the model at the first batch, and refers to it."""

    def __init__(self, model):
        self.head = model.model[-1]

    def __call__(self, preds, batch):
        maps = preds[1] if isinstance(preds, tuple) else preds
        target = batch["cls"][:, :, None, None]
        parts = torch.stack([F.binary_cross_entropy_with_logits(x, target.expand_as(x)) for x in maps])
        return parts * len(target), parts.detach()


class DetectionModel(nn.Module):
    """The forward of ultralytics' models: a dict is a batch to compute the loss of, a tensor is to be predicted."""

    def __init__(self):
        super().__init__()
        layers = [Conv(3, 8), Conv(8, 12), Conv(12, 16), Conv(16, 16), Detect((12, 16, 16), 5)]
        self.model = nn.Sequential(*layers)
        for i, module in enumerate(self.model):
            module.i, module.f = i, -1
        self.model[-1].f = [1, 2, 3]
        self.save = [1, 2, 3]

    def forward(self, x, *args, **kwargs):
        if isinstance(x, dict):
            return self.loss(x, *args, **kwargs)
        return self.predict(x, *args, **kwargs)

    def predict(self, x):
        y = []
        for m in self.model:
            if m.f != -1:
                x = y[m.f] if isinstance(m.f, int) else [x if j == -1 else y[j] for j in m.f]
            x = m(x)
            y.append(x if m.i in self.save else None)
        return x

    def loss(self, batch, preds=None):
        if getattr(self, "criterion", None) is None:
            self.criterion = self.init_criterion()
        return self.criterion(self.forward(batch["img"]) if preds is None else preds, batch)

    def init_criterion(self):
        return DetectionLoss(self)

    def fuse(self):
        for m in self.model.modules():
            if isinstance(m, Conv) and hasattr(m, "bn"):
                m.conv = nn.utils.fuse_conv_bn_eval(m.conv, m.bn)
                delattr(m, "bn")
                m.forward = m.forward_fuse
        return self


class SelfCalling(DetectionModel):
    """Calls itself for the predictions of its loss."""

    def loss(self, batch, preds=None):
        if getattr(self, "criterion", None) is None:
            self.criterion = self.init_criterion()
        return self.criterion(self(batch["img"]) if preds is None else preds, batch)


class ModelEMA:
    """As in ultralytics' utils/torch_utils.py."""

    def __init__(self, model, decay=0.5):
        self.ema, self.decay = copy.deepcopy(model).eval(), decay
        for parameter in self.ema.parameters():
            parameter.requires_grad_(False)

    def update(self, model):
        state = model.state_dict()
        for name, value in self.ema.state_dict().items():
            if value.dtype.is_floating_point:
                value.mul_(self.decay).add_(state[name].detach(), alpha=1 - self.decay)


@pytest.mark.parametrize("make", [DetectionModel, SelfCalling])
def test_ultralytics_trainer_trains_with_features_and_validates_saves_and_fuses(tmp_path, regularized, make):
    model = make()
    model = sfr.SFRWrapper(model)
    criterion = sfr.SFRLoss(model, label_loss=lambda output, _: output[0].sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ema = ModelEMA(model)
    batch = {"img": torch.randn(4, 3, 64, 64), "cls": torch.rand(4, 5)}
    for _ in range(3):
        model.train()
        output = model(batch)
        loss, loss_items = criterion(output, None), output[1]
        loss.backward()
        regularized(criterion)
        assert criterion.last.label == output[0].detach().sum()
        assert len(loss_items) == 3
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)

        ema.ema.eval()
        with torch.inference_mode():
            preds = ema.ema(batch["img"])
            loss, _ = ema.ema.loss(batch, preds)
    assert model.sfr.stage_names == ("model.0", "model.1", "model.2", "model.3")  # and none of the predictions
    plain = make().eval()
    plain.load_state_dict(ema.ema.state_dict())
    assert torch.equal(plain.loss(batch, plain(batch["img"]))[0], loss)

    torch.save({"model": None, "ema": copy.deepcopy(ema.ema.unwrap()).half()}, tmp_path / "last.pt")
    loaded = torch.load(tmp_path / "last.pt", weights_only=False)["ema"].float().eval()
    assert type(loaded) is make
    torch.testing.assert_close(loaded.fuse().predict(batch["img"])[0], preds[0], rtol=0.05, atol=0.05)
    assert torch.equal(ema.ema.fuse()(batch["img"])[0], ema.ema.predict(batch["img"])[0])
