"""timm's and torchvision's training scripts in small, each with the two lines where a user puts them."""

import argparse
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.models import load_checkpoint, resume_checkpoint
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops.misc import Conv2dNormActivation
from torchvision.transforms import v2

import sfr


def small_resnet():
    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 12, 16, 24), num_classes=10)


def convnet():
    torch.manual_seed(0)
    blocks = [Conv2dNormActivation(*widths, stride=2) for widths in ((3, 8), (8, 16), (16, 24))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def loader(seed=0, images=16, size=32, batch=8, **options):
    torch.manual_seed(seed)
    data = TensorDataset(torch.randn(images, 3, size, size), torch.randint(0, 10, (images,)))
    return DataLoader(data, batch, **options)


# timm's train.py


class TimmScript:
    """main() of timm's train.py up to its loop over epochs, and what it does in one."""

    def __init__(self, create_model, folder, compiled=False, resume=None):
        model = create_model()
        model = sfr.SFRWrapper(model)
        self.optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
        self.start = resume_checkpoint(model, resume, self.optimizer, log_info=False) if resume else 0
        self.ema = ModelEmaV3(model, decay=0.5)
        if resume:
            load_checkpoint(self.ema.module, resume, use_ema=True)
        if compiled:
            model = torch.compile(model, backend="eager")
        self.model = DistributedDataParallel(model)
        self.eval_model = torch.compile(self.ema, backend="eager") if compiled else self.ema
        self.train_loss_fn = sfr.SFRLoss(self.model)
        self.mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
        self.saver = CheckpointSaver(
            self.model, self.optimizer, argparse.Namespace(model="resnet"), self.ema,
            checkpoint_dir=str(folder), recovery_dir=str(folder), decreasing=True,
        )  # fmt: skip

    def train_one_epoch(self, epoch, regularized, accum_steps=2):
        np.random.seed(epoch)
        self.model.train()
        self.optimizer.zero_grad()
        for batch, (x, y) in enumerate(loader(epoch, images=32)):
            need_update = (batch + 1) % accum_steps == 0
            x, y = self.mixup(x, y)
            with nullcontext() if need_update else self.model.no_sync():
                with torch.autocast("cpu", torch.bfloat16):
                    output = self.model(x)
                    loss = self.train_loss_fn(output, y)
                loss /= accum_steps
                loss.backward()
            regularized(self.train_loss_fn)
            if need_update:
                dispatch_clip_grad(self.model.parameters(), 1.0, mode="norm")
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.ema.update(self.model, step=batch)

    def validate(self):
        self.eval_model.eval()
        losses = []
        with torch.inference_mode():
            for x, y in loader(seed=9):
                with torch.autocast("cpu", torch.bfloat16):
                    losses.append(self.train_loss_fn(self.eval_model(x), y).item())
        return losses


def assert_same_state(model, expected):
    for value, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize(("make", "compiled"), [(small_resnet, False), (convnet, True)], ids=["eager", "compiled"])
def test_timms_script_trains_with_features_validates_plainly_and_resumes(
    tmp_path, one_process, regularized, make, compiled
):
    torch._dynamo.reset()
    script, checkpoint = TimmScript(make, tmp_path, compiled), str(tmp_path / "last.pth.tar")
    script.train_one_epoch(0, regularized)
    losses = script.validate()
    script.saver.save_checkpoint(0, metric=losses[0])

    plain, average = make(), make().eval()
    resume_checkpoint(plain, checkpoint, log_info=False)
    load_checkpoint(average, checkpoint, use_ema=True)
    assert_same_state(script.model, plain)
    assert_same_state(script.ema, average)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert losses == [F.cross_entropy(average(x), y).item() for x, y in loader(seed=9)]

    resumed = TimmScript(make, tmp_path, resume=checkpoint)
    assert resumed.start == 1
    for each in (script, resumed):
        each.train_one_epoch(1, regularized)
    assert_same_state(resumed.model, script.model)
    assert_same_state(resumed.ema, script.ema)
    assert not torch.equal(next(resumed.model.parameters()), next(plain.parameters()))


def test_a_loss_that_the_loop_divides_in_place_leaves_the_logged_parts_alone(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model, feature_weight=0)
    loss = criterion(model(batch[0]), batch[1])
    label = criterion.last.label.item()
    loss /= 2
    assert criterion.last.label.item() == label


# timm's tasks


@pytest.fixture
def classification_task():
    return pytest.importorskip("timm.task", reason="timm has no tasks before 1.0.31").ClassificationTask


def a_task(make, compiled=False):
    model = sfr.SFRWrapper(convnet())
    task = make(model, sfr.SFRLoss(model), verbose=False)
    task.setup_ema(decay=0.5)
    if compiled:
        task.compile(backend="eager")
    task.prepare_distributed()
    return task


def train_task(task, regularized, epoch=0):
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.05)
    task.train()
    for x, y in loader(epoch):
        with torch.autocast("cpu", torch.bfloat16):
            result = task(x, y)
        result["loss"].backward()
        regularized(task.criterion)
        dispatch_clip_grad(task.get_clip_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
    return optimizer


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_timms_task_trains_with_features_and_evaluates_plainly(classification_task, one_process, regularized, compiled):
    torch._dynamo.reset()
    task = a_task(classification_task, compiled)
    train_task(task, regularized)
    task.eval()
    x, y = next(iter(loader(seed=9)))
    with torch.inference_mode():
        loss, result = F.cross_entropy(task.get_eval_model()(x), y), task(x, y)
    assert result["loss"] == loss


def test_timms_task_saves_the_plain_model(classification_task, one_process, regularized, tmp_path):
    task = a_task(classification_task)
    optimizer = train_task(task, regularized)
    folder = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, task=task, **folder)
    saver.save_checkpoint(0)
    plain = convnet()
    resume_checkpoint(plain, str(tmp_path / "last.pth.tar"), log_info=False)
    assert_same_state(plain, task.get_eval_model())


# torchvision's references/classification/train.py


class ExponentialMovingAverage(AveragedModel):
    """As in torchvision's references/classification/utils.py."""

    def __init__(self, model, decay, device="cpu"):
        def ema_avg(avg_model_param, model_param, num_averaged):
            return decay * avg_model_param + (1 - decay) * model_param

        super().__init__(model, device, ema_avg, use_buffers=True)


def set_weight_decay(model, weight_decay, norm_weight_decay):
    """As in torchvision's references/classification/utils.py: another decay for normalisation layers."""
    groups = {"other": [], "norm": []}

    def add(module):
        for parameter in module.parameters(recurse=False):
            groups["norm" if isinstance(module, nn.BatchNorm2d) else "other"].append(parameter)
        for child in module.children():
            add(child)

    add(model)
    decays = {"other": weight_decay, "norm": norm_weight_decay}
    return [{"params": parameters, "weight_decay": decays[name]} for name, parameters in groups.items()]


def collate_with_mixup(batch):
    return v2.RandomChoice([v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)])(*default_collate(batch))


def evaluate(model, criterion, data):
    model.eval()
    with torch.inference_mode():
        return [criterion(model(image), target).item() for image, target in data]


LABEL_LOSSES = {
    "smoothing of ours": ({"smoothing": "uniform", "alpha": 0.1}, F.cross_entropy),
    "the script's own criterion": (
        {"label_loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ),
}


@pytest.mark.parametrize(("switches", "validation"), LABEL_LOSSES.values(), ids=LABEL_LOSSES)
@pytest.mark.parametrize("collate", [None, collate_with_mixup], ids=["labels", "mixed"])
def test_torchvisions_script_trains_with_features(tmp_path, one_process, regularized, switches, validation, collate):
    model = convnet()
    model = sfr.SFRWrapper(model)
    optimizer = torch.optim.SGD(set_weight_decay(model, 1e-4, 0.0), lr=0.1, momentum=0.9)
    model = DistributedDataParallel(model)
    model_without_ddp = model.module
    criterion = sfr.SFRLoss(model, **switches)
    model_ema = ExponentialMovingAverage(model_without_ddp, decay=0.5)
    test = loader(seed=9)
    for epoch in range(2):
        model.train()
        for i, (image, target) in enumerate(loader(epoch, images=32, collate_fn=collate)):
            output = model(image)
            loss = criterion(output, target)
            optimizer.zero_grad()
            loss.backward()
            regularized(criterion)
            expected = F.cross_entropy(output.detach(), target, label_smoothing=0.1)
            torch.testing.assert_close(criterion.last.label, expected)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if i % 2 == 0:
                model_ema.update_parameters(model)
                model_ema.n_averaged.fill_(0)
        found = [evaluate(each, criterion, test) for each in (model, model_ema)]
    checkpoint = {"model": model_without_ddp.state_dict(), "model_ema": model_ema.state_dict()}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    plain = convnet()
    plain.load_state_dict(checkpoint["model"])
    average = ExponentialMovingAverage(convnet(), decay=0.5)
    average.load_state_dict(checkpoint["model_ema"])
    assert found == [evaluate(each, validation, test) for each in (plain, average)]


# torchvision's references/segmentation/train.py


def segmentation_criterion(inputs, target):
    """As in torchvision's references/segmentation/train.py."""
    losses = {name: F.cross_entropy(x, target, ignore_index=255) for name, x in inputs.items()}
    return losses["out"] if len(losses) == 1 else losses["out"] + 0.5 * losses["aux"]


def fcn():
    torch.manual_seed(0)
    backbone = IntermediateLayerGetter(resnet18(weights=None), {"layer4": "out", "layer3": "aux"})
    return FCN(backbone, FCNHead(512, 5), FCNHead(256, 5))


def test_torchvisions_segmentation_script_trains_with_its_own_criterion(regularized):
    model = fcn()
    model = sfr.SFRWrapper(model)
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    heads = [p for head in (model.classifier, model.aux_classifier) for p in head.parameters()]
    optimizer = torch.optim.SGD([{"params": backbone}, {"params": heads, "lr": 0.1}], lr=0.01, momentum=0.9)
    criterion = sfr.SFRLoss(model, label_loss=segmentation_criterion)
    image, target = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    target[:, :8] = 255
    for _ in range(2):
        model.train()
        output = model(image)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        regularized(criterion)
        torch.testing.assert_close(criterion.last.label, segmentation_criterion(output, target).detach())
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        output = model(image)
        expected = segmentation_criterion(output, target)
        assert criterion(output, target) == expected
    plain = fcn().eval()
    plain.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(plain(image)["out"], output["out"])
