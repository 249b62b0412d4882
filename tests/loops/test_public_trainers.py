"""Scripts of Hugging Face, Lightning and fastai in small, each with the two lines where a user puts them."""

import copy
import functools
import json
import warnings

import lightning
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    get_scheduler,
)

import sfr


@pytest.fixture(autouse=True)
def _their_own_warnings(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these libraries say of themselves and of each other
        warnings.filterwarnings("error", message=r"all the supervised|the features of|the criterion was|stage\(s\)")
        yield


# Hugging Face's run_image_classification_no_trainer.py


def vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=10, **sizes))


def resnet():
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


NETS = {"vit": vit, "resnet": resnet}
CALLS = {
    "logits": ({}, lambda criterion, outputs, batch: criterion(outputs.logits, batch["labels"])),
    "output": ({}, lambda criterion, outputs, batch: criterion(outputs, batch["labels"])),
    "its own loss": (
        {"label_loss": lambda output, _: output.loss},
        lambda criterion, outputs, batch: criterion(outputs, None),
    ),
}


class NoTrainer:
    """main() of the script, up to its loop."""

    def __init__(self, make, losses):
        torch.manual_seed(0)
        accelerator = self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make()
        model = sfr.SFRWrapper(model)
        data = [{"pixel_values": torch.randn(3, 16, 16), "labels": k % 10} for k in range(20)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=10)
        self.model, self.optimizer, self.train_data, self.eval_data, self.scheduler = accelerator.prepare(
            model, optimizer, DataLoader(data, 5), DataLoader(data, 8), scheduler
        )
        self.criterion = sfr.SFRLoss(model, **losses)
        accelerator.register_for_checkpointing(self.criterion)

    def train(self, call, regularized):
        self.model.train()
        for batch in self.train_data:
            with self.accelerator.accumulate(self.model):
                outputs = self.model(**batch)
                loss = call(self.criterion, outputs, batch)
                self.accelerator.backward(loss)
                regularized(self.criterion)
                torch.testing.assert_close(self.criterion.last.label, outputs.loss.detach())
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()

    def evaluate(self, call):
        self.model.eval()
        found, losses = [], []
        for batch in self.eval_data:
            with torch.no_grad():
                outputs = self.model(**batch)
            with torch.no_grad():
                losses.append((call(self.criterion, outputs, batch), outputs.loss))
            found.append(self.accelerator.gather_for_metrics((outputs.logits.argmax(dim=-1), batch["labels"])))
        return torch.cat([references for _, references in found]), losses


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("losses", "call"), CALLS.values(), ids=CALLS)
def test_hugging_faces_script_trains_evaluates_saves_and_resumes(tmp_path, regularized, net, losses, call):
    script = NoTrainer(NETS[net], losses)
    script.train(call, regularized)
    script.accelerator.save_state(str(tmp_path / "epoch_0"))
    script.train(call, regularized)
    references, evaluated = script.evaluate(call)
    assert len(references) == 20
    for loss, expected in evaluated:
        torch.testing.assert_close(loss, expected)

    script.accelerator.unwrap_model(script.model).save_pretrained(
        tmp_path / "saved", is_main_process=True, save_function=script.accelerator.save
    )
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [type(NETS[net]()).__name__]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(NETS[net]())
    torch.testing.assert_close(dict(loaded.state_dict()), dict(script.model.state_dict()), rtol=0, atol=0)

    resumed = NoTrainer(NETS[net], losses)
    resumed.accelerator.load_state(str(tmp_path / "epoch_0"))
    assert resumed.criterion.step == 4
    resumed.train(call, regularized)
    assert resumed.criterion.step == script.criterion.step == 8
    torch.testing.assert_close(dict(resumed.model.state_dict()), dict(script.model.state_dict()), rtol=0, atol=0)


# Lightning's examples of transfer learning


def backbone():
    return nn.Sequential(
        *[nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()],
        *[nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()],
        *[nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(1), nn.Linear(24, 1000)],
    )


class TransferLearning(lightning.LightningModule):
    """The backbone without its head, and a new head; the module itself is the net that is wrapped."""

    def __init__(self, regularized, lr=0.1):
        super().__init__()
        self.save_hyperparameters("lr")
        self.feature_extractor = nn.Sequential(*list(backbone().children())[:-1])
        self.fc = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))
        self.regularized, self.shares = regularized, []

    def forward(self, x):
        return self.fc(self.feature_extractor(x).squeeze(-1).squeeze(-1))

    def training_step(self, batch, _):
        return self.criterion(self(batch[0]), batch[1])

    def on_after_backward(self):
        if self.feature_extractor[0].weight.requires_grad:
            self.regularized(self.criterion)
        self.shares.append(float(self.criterion.last.feature))

    def validation_step(self, batch, _):
        logits = self(batch[0])
        self.log("val_loss", self.criterion(logits, batch[1]))
        self.log("plain", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=self.hparams.lr)


class MilestonesFinetuning(BaseFinetuning):
    """As in Lightning's example: the extractor is frozen, and its end, then its beginning, trained later."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.feature_extractor)

    def finetune_function(self, pl_module, epoch, optimizer):
        parts = {1: pl_module.feature_extractor[3:], 2: pl_module.feature_extractor[:3]}
        if epoch in parts:
            self.unfreeze_and_add_param_group(parts[epoch], optimizer, train_bn=True)


def fit(module, folder, callback, epochs=3):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, 16, 16), torch.arange(16) % 10)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=[callback], **quiet)
    trainer.fit(module, DataLoader(data, 8), DataLoader(data, 16))
    return trainer


def test_lightnings_transfer_learning_trains_with_features_once_it_is_unfrozen(tmp_path, regularized):
    torch.manual_seed(0)
    module = TransferLearning(regularized)
    module = sfr.SFRWrapper(module)
    module.criterion = sfr.SFRLoss(module)
    first = copy.deepcopy(module.feature_extractor.state_dict())
    trainer = fit(module, tmp_path, MilestonesFinetuning())
    assert module.criterion.step == 6
    assert all(share > 0 for share in module.shares)
    assert not torch.equal(module.feature_extractor[0].weight, first["0.weight"])
    assert trainer.callback_metrics["val_loss"] == trainer.callback_metrics["plain"]
    assert len(module.sfr.stage_names) == 3

    torch.manual_seed(0)
    straight = sfr.SFRWrapper(TransferLearning(regularized))
    straight(torch.randn(8, 3, 16, 16))
    assert module.sfr.stage_names == straight.sfr.stage_names  # found while they were frozen


def test_lightnings_checkpoint_of_a_wrapped_module_loads_into_the_plain_one(tmp_path, regularized):
    module = sfr.SFRWrapper(TransferLearning(regularized))
    module.criterion = sfr.SFRLoss(module)
    trainer = fit(module, tmp_path, MilestonesFinetuning(), epochs=1)
    path = trainer.checkpoint_callback.best_model_path
    loaded = TransferLearning.load_from_checkpoint(path, strict=False, regularized=None, weights_only=False)
    assert type(loaded) is TransferLearning
    assert loaded.hparams.lr == 0.1
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


class OnBackbone(lightning.LightningModule):
    """As BackboneFinetuning expects it: ``self.backbone``, and a head; the net of both is what is wrapped."""

    def __init__(self, regularized):
        super().__init__()
        self.backbone = backbone()[:-1].append(nn.Flatten())
        self.net = sfr.SFRWrapper(nn.Sequential(self.backbone, nn.Linear(24, 10)))
        self.criterion = sfr.SFRLoss(self.net)
        self.regularized = regularized

    def training_step(self, batch, _):
        return self.criterion(self.net(batch[0]), batch[1])

    def on_after_backward(self):
        if self.current_epoch:
            self.regularized(self.criterion)

    def configure_optimizers(self):
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.1)


def test_lightnings_backbone_finetuning_trains_with_features(tmp_path, regularized):
    module = OnBackbone(regularized)
    first = module.backbone[0].weight.detach().clone()
    fit(module, tmp_path, BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False))
    assert module.criterion.step == 6
    assert not torch.equal(module.backbone[0].weight, first)


# fastai's vision_learner and Learner


class Learner:
    """fastai's Learner in small: the model of a body and a head, frozen by groups; the loss as it reduces or not."""

    def __init__(self, model, loss_func):
        self.model, self.loss_func = model, loss_func
        self.opt = torch.optim.SGD([{"params": part.parameters()} for part in (model[:1], model[1:])], lr=0.1)

    def freeze_to(self, n):
        for i, group in enumerate(self.opt.param_groups):
            for parameter in group["params"]:
                parameter.requires_grad_(i >= n)

    def _do_one_batch(self):
        self.pred = self.model(*self.xb)
        self.loss_grad = self.loss_func(self.pred, *self.yb)
        self.loss = self.loss_grad.clone()
        if not self.model.training:
            return
        self.loss_grad.backward()
        self.opt.step()
        self.opt.zero_grad()

    def one_epoch(self, data, after_batch=None):
        self.model.train()
        for *self.xb, self.yb in data:
            self.yb = [self.yb]
            self._do_one_batch()
            if after_batch is not None:
                after_batch()
        self.model.eval()
        losses = []
        with torch.no_grad():
            for *self.xb, self.yb in data:
                self.yb = [self.yb]
                self._do_one_batch()
                losses.append(self.loss)
        return losses

    def losses_of_single_images(self, x, y):
        """As get_preds(with_loss=True) and Interpretation do."""
        self.model.eval()
        if hasattr(self.loss_func, "reduction"):
            loss_func = copy.copy(self.loss_func)
            loss_func.reduction = "none"
        else:
            loss_func = functools.partial(self.loss_func, reduction="none")
        with torch.no_grad():
            return loss_func(self.model(x), y)


@pytest.fixture
def learner():
    torch.manual_seed(0)
    body, head = backbone()[:-2], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    model = nn.Sequential(body, head)
    model = sfr.SFRWrapper(model)
    return Learner(model, sfr.SFRLoss(model))


def batches(count=2):
    return [(torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))) for _ in range(count)]


def test_fastais_learner_trains_with_features_frozen_and_unfrozen(learner, regularized):
    data = batches()
    learner.freeze_to(1)
    with pytest.warns(UserWarning, match="all the supervised stages are frozen"):
        learner.one_epoch(data)
    learner.freeze_to(0)
    losses = learner.one_epoch(data, lambda: regularized(learner.loss_func))
    assert learner.loss_func.step == 4
    plain = copy.deepcopy(learner.model).unwrap().eval()
    assert losses == [F.cross_entropy(plain(x), y) for x, y in data]


def test_fastais_losses_of_single_images_are_an_error_that_says_what_to_use(learner):
    ((x, y),) = batches(1)
    with pytest.raises(ValueError, match=r"no reduction='none'.*nn.CrossEntropyLoss\(reduction='none'\)"):
        learner.losses_of_single_images(x, y)
