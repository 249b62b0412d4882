"""The callbacks and the task of sfr.integrations log the parts of the loss and let a run resume exactly."""

import importlib
import warnings

import lightning
import pytest
import timm
import torch
import transformers
from torch.utils.data import DataLoader, TensorDataset

import sfr
from sfr.integrations.lightning import SFRCallback as LightningCallback
from sfr.integrations.transformers import SFRCallback as TrainerCallback

SWITCHES = {"smoothing": "class_mean", "feature_weight": sfr.Ramp(0, 0.25, steps=10)}
PARTS = {"sfr/label", "sfr/feature", "sfr/share", "sfr/weight"}


@pytest.fixture(autouse=True)
def _their_own_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(?!sfr)")  # what these libraries say of themselves
        yield


# Hugging Face's Trainer


def resnet():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 1, 1], layer_type="basic", num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


class Tracker(transformers.TrainerCallback):
    """What a tracker gets to see."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


def trainer_run(folder, steps=6, resume=None, resume_from=None, first=True):
    model = sfr.SFRWrapper(resnet())
    criterion, tracker = sfr.SFRLoss(model, **SWITCHES), Tracker()
    rows = [{"pixel_values": image, "labels": k % 10} for k, image in enumerate(torch.randn(32, 3, 16, 16))]
    args = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=3, logging_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model, args, train_dataset=rows, compute_loss_func=criterion, callbacks=[tracker])
    callback = TrainerCallback(criterion, resume_from)
    callback.add_to(trainer) if first else trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return model, criterion, trainer, tracker


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("first", [True, False])
def test_the_trainer_logs_the_parts_of_each_loss(tmp_path, first):
    _, criterion, trainer, tracker = trainer_run(tmp_path, first=first)
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4, 6]
    assert all(entry.keys() >= PARTS for entry in losses)
    assert losses[-1]["sfr/feature"] == pytest.approx(criterion.last.feature.item())
    assert {name for name in losses[0] if "similarity" in name} == {
        f"sfr/similarity {pair}" for pair in criterion.last.pairs
    }
    assert any(entry.keys() >= PARTS for entry in tracker.logs) == first
    assert not any("sfr/label" in entry for entry in trainer.state.log_history if "train_runtime" in entry)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_trainer_resumes_the_criterion_bit_for_bit(tmp_path, elsewhere):
    straight, criterion, *_ = trainer_run(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-3"
    folder = tmp_path / ("other" if elsewhere else "run")
    resumed, again, *_ = trainer_run(folder, resume=str(checkpoint), resume_from=checkpoint if elsewhere else None)
    assert again.step == criterion.step == 6
    assert_equal(again.state_dict(), criterion.state_dict())
    assert_equal(resumed.state_dict(), straight.state_dict())


def test_the_state_of_another_run_in_the_same_folder_is_left_alone(tmp_path):
    trainer_run(tmp_path / "run", steps=3)
    trainer_run(tmp_path / "other", steps=3)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    for folder, stated in (("other", None), ("run", tmp_path / "nowhere")):
        with pytest.warns(UserWarning, match="the criterion starts anew"):
            _, criterion, *_ = trainer_run(tmp_path / folder, steps=4, resume=checkpoint, resume_from=stated)
        assert criterion.step == 1
    _, criterion, *_ = trainer_run(tmp_path / "other", steps=4, resume=checkpoint, resume_from=checkpoint)
    assert criterion.step == 4


def test_a_run_that_was_resumed_is_resumed_again(tmp_path):
    for steps in (3, 6, 9):
        _, criterion, *_ = trainer_run(tmp_path, steps=steps, resume=steps > 3)
        assert criterion.step == steps


def test_a_checkpoint_without_the_criterion_is_a_warning(tmp_path):
    trainer_run(tmp_path)
    (tmp_path / "checkpoint-3" / "sfr_criterion.pt").unlink()
    with pytest.warns(
        UserWarning, match=r"the criterion starts anew, because none of these files exists and is .*resume_from="
    ):
        _, criterion, *_ = trainer_run(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert criterion.step == 3


# Lightning


class Module(lightning.LightningModule):
    def __init__(self, net, outside):
        super().__init__()
        self.model = sfr.SFRWrapper(net)
        criterion = sfr.SFRLoss(self.model, **SWITCHES)
        if outside:  # of a function or the like: no submodule
            self.get_criterion = lambda: criterion
        else:
            self.criterion = criterion

    def training_step(self, batch):
        criterion = self.criterion if hasattr(self, "criterion") else self.get_criterion()
        return criterion(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Logged(lightning.Callback):
    def __init__(self):
        self.names = set()

    def on_train_epoch_end(self, trainer, pl_module):
        self.names |= trainer.logged_metrics.keys()


def lightning_trainer(callbacks, steps=2, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"max_steps": steps, "enable_checkpointing": False} | options
    return lightning.Trainer(accelerator="cpu", log_every_n_steps=1, callbacks=callbacks, **quiet, **given)


@pytest.mark.parametrize("outside", [False, True])
def test_lightning_logs_the_parts_and_resumes_bit_for_bit(make_net, tmp_path, outside):
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10

    def fit(epochs, folder, checkpoint=None):
        torch.manual_seed(1)
        module, logged = Module(make_net(), outside), Logged()
        criterion = module.get_criterion() if outside else module.criterion
        callbacks = [LightningCallback(criterion if outside else None), logged]
        options = {"max_epochs": epochs, "default_root_dir": tmp_path / folder, "enable_checkpointing": True}
        trainer = lightning_trainer(callbacks, steps=-1, **options)
        trainer.fit(module, DataLoader(TensorDataset(images, labels), 4), ckpt_path=checkpoint)
        return module, criterion, trainer, logged

    straight, criterion, _, logged = fit(2, "straight")
    assert logged.names >= PARTS
    assert criterion.step == 8
    _, _, trainer, _ = fit(1, "stopped")
    resumed, again, *_ = fit(2, "resumed", trainer.checkpoint_callback.best_model_path)
    assert_equal(again.state_dict(), criterion.state_dict())
    assert_equal(resumed.model.state_dict(), straight.model.state_dict())


def lightning_data():
    return DataLoader(TensorDataset(torch.randn(16, 3, 16, 16), torch.arange(16) % 10), 4)


@pytest.mark.parametrize("outside", [False, True])
def test_a_lightning_checkpoint_holds_the_criterion_once(make_net, tmp_path, outside):
    module = Module(make_net(), outside)
    trainer = lightning_trainer([LightningCallback(module.get_criterion() if outside else None)])
    trainer.fit(module, lightning_data())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)
    of_callback = saved["callbacks"].get("SFRCallback", {})
    of_module = [name for name in saved["state_dict"] if name.startswith("criterion.")]
    assert (bool(of_callback), bool(of_module)) == (outside, not outside)


def test_a_lightning_callback_goes_with_the_module_that_is_trained(make_net):
    callback = LightningCallback()
    for weight in (0.5, 0.125):
        module = Module(make_net(), outside=False)
        module.criterion = sfr.SFRLoss(module.model, feature_weight=weight)
        trainer = lightning_trainer([callback])
        trainer.fit(module, lightning_data())
        assert trainer.callback_metrics["sfr/weight"] == weight


def test_the_callbacks_end_the_epochs(make_net, tmp_path):
    module = Module(make_net(), outside=False)
    module.criterion = sfr.SFRLoss(module.model, smoothing="class_mean", update="epoch")
    module.criterion.labels.means.counts = torch.ones(10)
    module.criterion.labels.means.distributions = torch.full((10, 10), 0.1)
    module.criterion.labels.means.sums = torch.eye(10)
    lightning_trainer([LightningCallback()], steps=4).fit(module, lightning_data())
    assert not torch.equal(module.criterion.labels.distributions, torch.full((10, 10), 0.1))

    model = sfr.SFRWrapper(resnet())
    criterion = sfr.SFRLoss(model, smoothing="class_mean", update="epoch")
    criterion.labels.means.counts, criterion.labels.means.sums = torch.ones(10), torch.eye(10)
    criterion.labels.means.distributions = torch.full((10, 10), 0.1)
    rows = [{"pixel_values": image, "labels": k % 10} for k, image in enumerate(torch.randn(16, 3, 16, 16))]
    args = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model, args, train_dataset=rows, compute_loss_func=criterion)
    TrainerCallback(criterion).add_to(trainer)
    trainer.train()
    assert not torch.equal(criterion.labels.distributions, torch.full((10, 10), 0.1))


def test_lightning_logs_and_saves_two_criteria_by_their_names(make_net, tmp_path):
    class Two(Module):
        def training_step(self, batch):
            return self.first(self.model(batch[0]), batch[1]) + self.second(self.other(batch[0]), batch[1])

    module = Two(make_net(), outside=True)
    module.other = sfr.SFRWrapper(make_net())
    criteria = [sfr.SFRLoss(each, smoothing="class_mean") for each in (module.model, module.other)]
    module.first, module.second = (lambda *given, each=each: each(*given) for each in criteria)
    callbacks = [LightningCallback(criteria[0]), LightningCallback(criteria[1], name="second")]
    trainer = lightning_trainer(callbacks)
    trainer.fit(module, lightning_data())
    assert {"sfr/label", "second/label"} <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)["callbacks"]
    for callback, criterion in zip(callbacks, criteria, strict=True):
        assert_equal(saved[callback.state_key], criterion.state_dict())
    assert callbacks[0].state_key != callbacks[1].state_key


def test_lightning_misses_a_criterion_it_is_not_told_of(make_net, tmp_path):
    trainer = lightning.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[LightningCallback()],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"Module has no attribute criterion.*SFRCallback\(criterion\)"):
        trainer.fit(Module(make_net(), outside=True), DataLoader(TensorDataset(torch.zeros(1, 3, 16, 16))))


# timm


def has_tasks():
    try:
        return bool(importlib.import_module("timm.task").resume_task_checkpoint)
    except (ImportError, AttributeError):
        return False


@pytest.mark.skipif(not has_tasks(), reason="timm has training tasks from 1.0.31 on")
def test_timm_resumes_the_criterion_bit_for_bit_through_its_own_checkpoint(tmp_path):
    from timm.task import resume_task_checkpoint
    from timm.utils import CheckpointSaver

    from sfr.integrations.timm import SFRTask

    def build():
        torch.manual_seed(0)
        net = timm.create_model("resnet10t", num_classes=10)
        model = sfr.SFRWrapper(net)
        task = SFRTask(model, sfr.SFRLoss(model, **SWITCHES), verbose=False)
        task.setup_ema(decay=0.9)
        return task, torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)

    def train(task, optimizer, seed):
        images = torch.randn(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        for step, batch in enumerate(images):
            result = task(batch, torch.arange(8))
            assert {"loss", "output", "label", "feature"} <= result.keys()
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            task.update_ema(step)

    straight, optimizer = build()
    train(straight, optimizer, 1)
    saver = CheckpointSaver(
        straight.trainable_module, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), task=straight
    )
    saver.save_checkpoint(0, metric=1.0)
    train(straight, optimizer, 2)

    resumed, optimizer = build()
    assert resume_task_checkpoint(resumed, str(tmp_path / "last.pth.tar"), optimizer, log_info=False) == 1
    assert resumed.criterion.step == 3
    train(resumed, optimizer, 2)
    assert resumed.criterion.step == 6
    assert_equal(resumed.criterion.state_dict(), straight.criterion.state_dict())
    assert_equal(resumed.trainable_module.state_dict(), straight.trainable_module.state_dict())
    plain = timm.create_model("resnet10t", num_classes=10)
    plain.load_state_dict(torch.load(tmp_path / "last.pth.tar", weights_only=True)["state_dict"])


class Whole(lightning.LightningModule):
    """A LightningModule that is wrapped itself: its forward is the model's."""

    def __init__(self, net):
        super().__init__()
        self.net, self.losses = net, []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        self.losses.append(self.criterion(self(batch[0]), batch[1]))
        return self.losses[-1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(folder):
    return lightning.Trainer(
        max_epochs=1, default_root_dir=folder, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


@pytest.mark.parametrize("wrapped", ["the module", "its net"])
def test_the_criterion_finds_the_model_in_a_lightning_module(make_net, tmp_path, wrapped):
    module = Whole(make_net())
    model = sfr.SFRWrapper(module if wrapped == "the module" else module.net)
    module.criterion = sfr.SFRLoss(module)
    assert module.criterion.model is model
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8)), 4))
    assert module.criterion.step == 2
    assert module.criterion.last.feature > 0
    state = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    assert {f"net.{name}" for name in make_net().state_dict()} == {name for name in state if "criterion" not in name}
