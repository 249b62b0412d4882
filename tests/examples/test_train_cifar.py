"""A run writes what it promises, resumes bit for bit, is the same over processes, and fails early and clearly."""

import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys

import accelerate
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from processes import run_ranks
from torch.multiprocessing import ProcessExitedException
from written_runs import Killed, assert_same_weights, kill_at_call, metrics, weights

import sfr
import train_cifar
from common import data, runs
from common.checkpoint_files import checkpoints
from common.data import load_splits
from common.folder_lock import FolderLock
from common.learning_rate import warmup_then_cosine
from common.metrics import ClassificationMetric
from common.models import build_model


def small(output_dir, *arguments):
    """Three epochs of two steps on 22 digits, so that the last test batch is a partial one."""
    return [
        *("--model", "resnet8", "--limit", "22", "--batch-size", "10", "--epochs", "3"),
        *("--output-dir", str(output_dir), *arguments),
    ]


def train(output_dir, *arguments):
    return train_cifar.main(small(output_dir, *arguments))


def timeless(records):
    return [{name: value for name, value in record.items() if "second" not in name} for record in records]


def plain_metrics(folder):
    """The test metrics of a run's saved weights, all images in one batch, in one process."""
    model = build_model("resnet8", 10).eval()
    model.load_state_dict(weights(folder))
    test = load_splits("digits", None, limit=22).test
    images, labels = test.collate([test[i] for i in range(len(test))])
    metric = ClassificationMetric(keep_in_memory=True)
    with torch.no_grad():
        metric.add_batch(predictions=model(images).numpy(), references=labels.numpy())
    return {f"test_{name}": value for name, value in metric.compute().items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing has disturbed, to be compared with and not to be changed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder)
    return folder


def test_run_announces_itself_and_writes_every_artefact(tmp_path, capsys):
    returned = train(tmp_path / "run")
    printed = capsys.readouterr().out
    assert "processes 1, device cpu, precision no" in printed
    assert "digits: 22 training images, 0 held out, 22 test images" in printed
    assert "after the last epoch: test_accuracy" in printed

    folder = tmp_path / "run"
    assert [record["epoch"] for record in metrics(folder)] == [1, 2, 3]
    assert {"train_label_loss", "train_feature_loss", "images_per_second"} <= metrics(folder)[0].keys()
    assert json.loads((folder / "config.json").read_text())["method"] == "sfr"
    plain = build_model("resnet8", 10)
    plain.load_state_dict(weights(folder), strict=True)
    assert_same_weights(plain.state_dict(), returned.state_dict())


def test_progress_bar_shows_loss_parts_and_images_per_second(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "SHOW_LOSS_EVERY", 1)
    train(tmp_path, "--epochs", "1")
    bar = capsys.readouterr().err
    assert all(part in bar for part in ("images/s", "loss=", "label_loss=", "feature_loss="))


def test_its_curves_are_drawn(undisturbed):
    assert (undisturbed / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert plt.imread(undisturbed / "curves.png").std() > 0.01


def test_result_is_that_of_the_last_epoch_on_the_whole_test_set(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    expected = plain_metrics(undisturbed)
    assert {name: summary[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert timeless([summary]) == timeless(metrics(undisturbed)[-1:])


def test_with_a_held_out_part_the_test_set_is_used_once_at_the_end(tmp_path):
    train(tmp_path, "--val-fraction", "0.3")
    for record in metrics(tmp_path):
        assert "val_accuracy" in record
        assert "test_accuracy" not in record
    assert "test_accuracy" in json.loads((tmp_path / "summary.json").read_text())


@pytest.mark.parametrize("method", ["vanilla", "label-smoothing"])
def test_the_other_methods_train_too(tmp_path, method):
    train(tmp_path, "--method", method, "--epochs", "1")
    assert "train_feature_loss" not in metrics(tmp_path)[0]


def test_sfr_options_reach_the_configuration(tmp_path):
    train(
        tmp_path,
        "--epochs",
        "1",
        "--sfr",
        "feature_weight=0.5",
        "grouping=mean",
        "smoothing=class_mean",
        "update=epoch",
    )
    written = json.loads((tmp_path / "config.json").read_text())["sfr"]
    assert (written["feature_weight"], written["grouping"], written["update"]) == (0.5, "mean", "epoch")


def test_images_come_with_the_numbers_by_which_past_predictions_are_kept(tmp_path, monkeypatch):
    seen, forward = [], sfr.SFRLoss.forward

    def noted(criterion, logits, labels, index):
        seen.append((criterion, labels, index))
        return forward(criterion, logits, labels, index=index)

    monkeypatch.setattr(sfr.SFRLoss, "forward", noted)
    splits = load_splits("digits", None, limit=22)
    train(tmp_path, "--epochs", "1", "--sfr", "smoothing=past", f"num_samples={len(splits.train)}")
    index = torch.cat([numbers for _, _, numbers in seen])
    assert torch.equal(splits.train.data.labels[index], torch.cat([labels for _, labels, _ in seen]))
    remembered = seen[0][0].labels.past.table.sum(dim=1) > 0
    assert set(remembered.nonzero().flatten().tolist()) == set(index.tolist())


def test_max_steps_ends_the_run_within_an_epoch(tmp_path):
    train(tmp_path, "--max-steps", "3")
    assert [record["step"] for record in metrics(tmp_path)] == [2, 3]


def test_tracker_logs_every_epoch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "--tracker", "tensorboard")
    events = EventAccumulator(str(tmp_path / "sfr")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3]


def killed_at_the_fourth_step(rank, folder):
    step, calls = accelerate.Accelerator.backward, []

    def fatal(*args):
        calls.append(args)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)

    accelerate.Accelerator.backward = fatal
    train(folder)


def test_run_killed_in_mid_epoch_resumes_to_the_weights_of_an_undisturbed_one(tmp_path, undisturbed):
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(killed_at_the_fourth_step, tmp_path / "killed", ranks=1, environment={"ACCELERATE_USE_CPU": "true"})
    assert len(metrics(tmp_path / "killed")) == 1
    train(tmp_path / "killed", "--resume")
    assert_same_weights(weights(tmp_path / "killed"), weights(undisturbed))
    assert timeless(metrics(tmp_path / "killed")) == timeless(metrics(undisturbed))


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        ("accelerate.Accelerator", "save_state", 2),  # before the second checkpoint
        ("common.run_folder", "seal", 2),  # it is written, but has no manifest yet
        ("pathlib.Path", "rename", 2),  # it is complete, but has not its name yet
        ("common.run_folder.shutil", "rmtree", 4),  # the third has its name, the first is still there
        ("common.run_folder.RunFolder", "finish", 1),  # trained, but nothing written
    ],
)
def test_kill_around_a_checkpoint_leaves_a_usable_one(tmp_path, monkeypatch, undisturbed, owner, name, number):
    with monkeypatch.context() as patch:
        kill_at_call(patch, pkgutil.resolve_name(owner), name, number)
        with pytest.raises(Killed):
            train(tmp_path / "killed")
    train(tmp_path / "killed", "--resume")
    assert_same_weights(weights(tmp_path / "killed"), weights(undisturbed))
    assert timeless(metrics(tmp_path / "killed")) == timeless(metrics(undisturbed))
    assert checkpoints(tmp_path / "killed")[-1].name == "checkpoint-0003"


def test_resume_is_exact_with_loading_processes(tmp_path, monkeypatch):
    arguments = ("--num-workers", "1", "--epochs", "2")
    train(tmp_path / "undisturbed", *arguments)
    with monkeypatch.context() as patch:
        kill_at_call(patch, accelerate.Accelerator, "backward", 4)
        with pytest.raises(Killed):
            train(tmp_path / "killed", *arguments)
    train(tmp_path / "killed", *arguments, "--resume")
    assert_same_weights(weights(tmp_path / "killed"), weights(tmp_path / "undisturbed"))


def test_resuming_a_finished_run_changes_nothing(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    train(tmp_path / "run", "--resume")
    assert_same_weights(weights(tmp_path / "run"), weights(undisturbed))
    assert metrics(tmp_path / "run") == metrics(undisturbed)


def in_one_of_two_processes(rank, folder):
    return train(folder, "--epochs", "1").state_dict()


def test_two_processes_share_weights_and_measure_what_one_would(tmp_path):
    """By forked ranks, which start sooner; `.ci/run` starts them by `accelerate launch`."""
    ranks = run_ranks(in_one_of_two_processes, tmp_path / "run", environment={"ACCELERATE_USE_CPU": "true"})
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["processes"], config["device"]) == (2, "cpu")
    assert_same_weights(*ranks)
    assert_same_weights(ranks[0], weights(tmp_path / "run"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    expected = plain_metrics(tmp_path / "run")
    assert {name: summary[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--lr", "0.2"], "lr was 0.1, is 0.2"),
        (["--seed", "1"], "seed was 0, is 1"),
        (["--model", "resnet20"], "model was 'resnet8', is 'resnet20'"),
        (["--sfr", "feature_weight=0.5"], "sfr was"),
        (["--epochs", "4", "--batch-size", "16"], "batch_size was 10, is 16; epochs was 3, is 4"),
    ],
)
def test_resume_from_another_configuration_names_what_differs(tmp_path, changed, named):
    train(tmp_path, "--max-steps", "1")
    with pytest.raises(SystemExit, match=named):
        train(tmp_path, "--max-steps", "1", "--resume", *changed)


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    train(tmp_path, "--max-steps", "1")
    before = weights(tmp_path)
    with pytest.raises(SystemExit, match="holds a run: pass --resume or another --output-dir"):
        train(tmp_path, "--max-steps", "1")
    assert_same_weights(weights(tmp_path), before)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("common.data", "load_splits"),  # while it loads its data
        ("accelerate.Accelerator", "backward"),  # in its first epoch
        ("accelerate.Accelerator", "save_state"),  # before its first checkpoint
    ],
)
def test_resume_of_a_run_killed_within_its_first_epoch_starts_it_again(
    tmp_path, monkeypatch, capsys, undisturbed, owner, name
):
    with monkeypatch.context() as patch:
        kill_at_call(patch, pkgutil.resolve_name(owner), name, 1)
        with pytest.raises(Killed):
            train(tmp_path / "killed")
    train(tmp_path / "killed", "--resume")
    assert "holds no checkpoint yet: starting at epoch 1" in capsys.readouterr().out
    assert_same_weights(weights(tmp_path / "killed"), weights(undisturbed))
    assert timeless(metrics(tmp_path / "killed")) == timeless(metrics(undisturbed))


def test_resume_past_a_damaged_checkpoint_ends_with_the_weights_of_an_undisturbed_run(tmp_path, undisturbed, capsys):
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run/checkpoint-0003/random_states_0.pkl").unlink()
    train(tmp_path / "run", "--resume")
    printed = capsys.readouterr().out
    assert "checkpoint-0003/random_states_0.pkl is missing" in printed
    assert "resuming after epoch 2" in printed
    assert_same_weights(weights(tmp_path / "run"), weights(undisturbed))
    assert timeless(metrics(tmp_path / "run")) == timeless(metrics(undisturbed))


def test_a_second_run_into_the_same_folder_refuses_before_it_loads_the_data(tmp_path, monkeypatch):
    lock = FolderLock(tmp_path)
    assert lock.acquire()
    kill_at_call(monkeypatch, data, "load_splits", 1)
    for arguments in ([], ["--resume"]):
        with pytest.raises(SystemExit, match="is in use by process"):
            train(tmp_path, *arguments)
    lock.release()


def test_the_same_command_again_by_plain_python_gets_a_folder_of_its_own(
    tmp_path, monkeypatch, capfd, environment, examples
):
    monkeypatch.chdir(tmp_path)
    name, arguments = "runs/digits-resnet8-sfr-seed0", ["--model", "resnet8", "--limit", "40", "--batch-size", "40"]
    train_cifar.main([*arguments, "--max-steps", "1"])
    command = [sys.executable, examples / "train_cifar.py", *arguments, "--max-steps", "1"]
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("processes 1, device cpu")  # no noise before it
    assert again.stdout.splitlines()[-1] == f"wrote {name}-2"
    assert not any(noise in again.stderr for noise in ("Traceback", "arning", "accelerate"))
    assert_same_weights(weights(tmp_path / name), weights(tmp_path / f"{name}-2"))
    capfd.readouterr()
    train_cifar.main([*arguments, "--max-steps", "1", "--resume"])
    assert capfd.readouterr().out.splitlines()[-1] == f"wrote {name}-2"


def test_an_unwritable_output_directory_is_an_error_before_any_step(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    kill_at_call(monkeypatch, data, "load_splits", 1)
    with pytest.raises(SystemExit, match=r"--output-dir: cannot write to .*file/run"):
        train(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "128"], "--batch-size 128 is more than the 22 training images"),
        (["--model", "resnet21"], "--model resnet21: no such model"),
        (["--sfr", "wieght=1"], "--sfr: .*wieght"),
        (["--sfr", "feature_weight=-1"], "--sfr: feature_weight must be finite and at least 0"),
        (["--stages", "nowhere"], "nowhere"),
        (
            ["--init", __file__],
            r"--init: .*test_train_cifar\.py is not a readable file of weights: it is not what torch",
        ),
        (["--tracker", "aim"], "--tracker aim: its package is not installed"),
    ],
)
def test_a_wrong_option_is_an_error_that_leaves_no_run_behind(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "run", *arguments)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--val-fraction", "1"],
        ["--sfr", "feature_weight"],
        ["--method", "vanilla", "--sfr", "feature_weight=1"],
        ["--method", "vanilla", "--stages", "layer1"],
        ["--data-dir", "."],
        ["--dataset", "cifar1000"],
    ],
)
def test_arguments_out_of_range_print_the_usage(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit):
        train(tmp_path, *arguments)
    assert "error: " in capsys.readouterr().err


def read_the_hub(rank, folder):
    """Return with which message the program ends."""
    try:
        train(folder, "--dataset", "cifar100")
    except SystemExit as end:
        return str(end)


def test_without_network_and_data_dir_one_line_names_both_ways_out(tmp_path, environment):
    (message,) = run_ranks(read_the_hub, tmp_path / "run", ranks=1, environment=environment)
    assert "\n" not in message
    assert "unset HF_HUB_OFFLINE" in message
    assert "--data-dir" in message


def test_warm_up_rises_to_the_peak_and_the_cosine_falls_to_zero():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = warmup_then_cosine(optimizer, steps=100)
    rates = []
    for _ in range(101):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(np.diff(rates[5:]) < 0)
    assert rates[100] == pytest.approx(0)
