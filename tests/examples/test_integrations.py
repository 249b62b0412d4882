"""Hugging Face's Trainer, Lightning and torchrun use the feature term, save the plain model and resume exactly."""

import shutil
import subprocess
import sys
import warnings

import lightning
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from scripts import run_example
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sfr

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module", autouse=True)
def _no_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(autouse=True)
def _their_own_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these libraries say of themselves and of each other
        yield


def assert_feature_term_used(last):
    assert last.feature.isfinite()
    assert last.feature > 0
    assert last.weight > 0


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# Hugging Face's Trainer


@pytest.fixture(scope="module")
def hf_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return run_example("hf_trainer.py", folder), folder / "runs" / "hf"


def test_trainer_trains_with_the_feature_term(hf_run):
    names, _ = hf_run
    assert_feature_term_used(names["criterion"].last)
    assert names["criterion"].step == names["trainer"].state.global_step == 90
    losses = [record["loss"] for record in names["trainer"].state.log_history if "loss" in record]
    assert names["trainer"].state.log_history[-1]["eval_loss"] < 1.0
    assert all(loss > 0 for loss in losses)


def test_trainer_evaluates_with_plain_cross_entropy(hf_run):
    names, _ = hf_run
    test = names["digits"][1440:]
    net = names["net"].eval()
    with torch.no_grad():
        logits = net(pixel_values=torch.stack([row["pixel_values"] for row in test])).logits
    expected = F.cross_entropy(logits, torch.tensor([row["labels"] for row in test])).item()
    assert names["trainer"].state.log_history[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_trainer_saves_the_plain_model(hf_run):
    names, folder = hf_run
    plain = transformers.ResNetForImageClassification(names["config"])
    for file in (folder / "model.safetensors", folder / "checkpoint-90" / "model.safetensors"):
        assert_equal_states(load_file(file), names["net"].state_dict())
        plain.load_state_dict(load_file(file))
    loaded = transformers.ResNetForImageClassification.from_pretrained(folder)
    assert_equal_states(loaded.state_dict(), names["net"].state_dict())


def test_trainer_resumes_bit_for_bit(hf_run, tmp_path):
    names, folder = hf_run
    shutil.copytree(folder / "checkpoint-60", tmp_path / "runs" / "hf" / "checkpoint-60")
    resumed = run_example("hf_trainer.py", tmp_path, "--resume")
    assert resumed["criterion"].step == 90
    assert_equal_states(resumed["net"].state_dict(), names["net"].state_dict())
    assert_equal_states(resumed["criterion"].state_dict(), names["criterion"].state_dict())


class PlainNet(nn.Module):
    """Not of Hugging Face: its forward takes the image and nothing else."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, pixel_values):
        return {"logits": self.layers(pixel_values)}


def weights_after_two_steps(folder, accumulation, weight, ignored):
    torch.manual_seed(0)
    model = sfr.SFRWrapper(PlainNet(), stages=["layers.0", "layers.1"])
    labels = [-100 if k in ignored else k % 8 for k in range(16)]
    images = [{"pixel_values": torch.randn(1, 8, 8), "labels": label} for label in labels]
    args = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        num_train_epochs=1,
        remove_unused_columns=False,
        report_to="none",
    )
    criterion = sfr.SFRLoss(model, feature_weight=weight, smoothing="uniform")
    transformers.Trainer(model, args, train_dataset=images, compute_loss_func=criterion).train()
    assert criterion.step == 2 * accumulation
    assert (criterion.last.feature > 0) == (weight > 0)
    return model.unwrap().state_dict()


@pytest.mark.parametrize(("weight", "ignored"), [(0.5, ()), (0.0, (0, 3, 4, 10))], ids=["features", "ignored labels"])
def test_trainer_accumulates_to_the_gradient_of_the_whole_batch(tmp_path, weight, ignored):
    whole, parts = (weights_after_two_steps(tmp_path, accumulation, weight, ignored) for accumulation in (1, 2))
    torch.testing.assert_close(parts, whole)


# Lightning


@pytest.fixture(scope="module")
def lightning_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    return run_example("lightning_module.py", folder), folder / "runs" / "lightning"


def lightning_fit(module, folder, epochs, loaders, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, *loaders, **options)
    return trainer


def test_lightning_trains_with_the_feature_term(lightning_run):
    names, _ = lightning_run
    classifier = names["classifier"]
    assert_feature_term_used(classifier.criterion.last)
    assert classifier.criterion.step == names["trainer"].global_step == 69
    assert names["trainer"].callback_metrics["val_loss"] < 2.2  # untrained: ln 10 = 2.30


def test_lightning_validates_with_plain_cross_entropy(lightning_run):
    names, _ = lightning_run
    with torch.no_grad():
        rows = [(names["net"].eval()(images), labels) for images, labels in DataLoader(names["test"], 1000)]
    expected = F.cross_entropy(*rows[0])
    torch.testing.assert_close(names["trainer"].callback_metrics["val_loss"], expected)


def test_lightning_script_saves_the_plain_model(lightning_run):
    names, folder = lightning_run
    weights = torch.load(folder / "model.pt", weights_only=True)
    assert list(weights) == ["0.weight", "0.bias", "2.weight", "2.bias", "6.weight", "6.bias"]
    assert_equal_states(weights, names["net"].state_dict())


def test_lightning_checkpoint_holds_the_model_once_and_the_criterion(lightning_run):
    names, folder = lightning_run
    (file,) = (folder / "checkpoints").iterdir()
    state = torch.load(file, weights_only=False)["state_dict"]
    of_the_criterion = {f"criterion.{name}" for name in names["classifier"].criterion.state_dict()}
    assert state.keys() == {f"model.{name}" for name in names["net"].state_dict()} | of_the_criterion


def test_lightning_resumes_bit_for_bit(lightning_run, tmp_path):
    names, _ = lightning_run
    loaders = DataLoader(names["train"], 64), DataLoader(names["test"], 256)

    def fresh():
        torch.manual_seed(0)
        return names["Classifier"](PlainNet().layers)

    straight, stopped, resumed = fresh(), fresh(), fresh()
    lightning_fit(straight, tmp_path / "straight", 2, loaders)
    trainer = lightning_fit(stopped, tmp_path / "stopped", 1, loaders)
    checkpoint = trainer.checkpoint_callback.best_model_path
    lightning_fit(resumed, tmp_path / "resumed", 2, loaders, ckpt_path=checkpoint)
    assert_equal_states(resumed.model.state_dict(), straight.model.state_dict())
    assert resumed.criterion.step == straight.criterion.step == 46
    assert_equal_states(resumed.criterion.state_dict(), straight.criterion.state_dict())


def test_lightning_can_build_the_model_in_configure_model(tmp_path, make_net, batch):
    class Late(lightning.LightningModule):
        def configure_model(self):
            self.model = sfr.SFRWrapper(make_net())
            self.criterion = sfr.SFRLoss(self.model)

        def training_step(self, batch):
            return self.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Late()
    lightning_fit(module, tmp_path, 1, [DataLoader(TensorDataset(*batch), 4)])
    assert_feature_term_used(module.criterion.last)


def test_training_mode_may_be_set_module_by_module(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model)
    model.eval()
    for module in model.modules():  # as Lightning does after a validation
        module.training = True
    criterion(model(batch[0]), batch[1])
    assert_feature_term_used(criterion.last)


# torchrun


def test_torchrun_example_trains_two_processes_with_the_feature_term(examples, environment, tmp_path):
    command = [*LAUNCH, "--redirects=1", f"--log-dir={tmp_path / 'logs'}", str(examples / "torchrun_ddp.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    first, second = (next((tmp_path / "logs").rglob(f"{rank}/stdout.log")).read_text() for rank in (0, 1))
    assert float(first.split("feature=tensor(")[1].split(")")[0]) > 0
    assert not second
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(weights) == ["0.weight", "0.bias", "2.weight", "2.bias", "6.weight", "6.bias"]
