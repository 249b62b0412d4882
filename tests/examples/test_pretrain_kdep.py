"""Pre-training runs its three stages, resumes each, takes a given teacher, and is the same over processes."""

import json
import shutil

import accelerate
import pytest
import torch
from processes import run_ranks
from torch import nn
from written_runs import Killed, assert_same_weights, kill_at_call, metrics, weights

import pretrain_kdep
from common.folder_lock import FolderLock
from common.models import build_model
from common.run_folder import curves
from common.weights import load_backbone
from sfr.pretrain import Alignment, PooledFeatures

STAGES = ("teacher", "pretrain", "finetune")


def small(output_dir, *arguments):
    """Two epochs of two steps of pre-training, one of the others, on 70 digits."""
    return [
        *("--limit", "70", "--batch-size", "32", "--teacher", "resnet8", "--epochs", "2", "--seed", "1"),
        *("--teacher-epochs", "1", "--finetune-epochs", "1", "--output-dir", str(output_dir), *arguments),
    ]


def run(output_dir, *arguments):
    return pretrain_kdep.main(small(output_dir, *arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run, to be compared with and not to be changed, and the student it returned."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


def test_every_stage_writes_what_a_run_of_train_cifar_writes(finished):
    folder, _ = finished
    for stage in STAGES:
        written = {file.name for file in (folder / stage).iterdir()}
        assert {"config.json", "metrics.jsonl", "summary.json", "model.pt", "curves.png"} <= written
    assert "test_accuracy" in metrics(folder / "finetune")[0]
    assert [sorted(record.keys() & {"train_loss", "test_loss"}) for record in metrics(folder / "pretrain")] == [
        ["test_loss", "train_loss"]
    ] * 2


def test_alignment_is_saved_and_plotted(finished):
    folder, _ = finished
    alignment = Alignment(**torch.load(folder / "pretrain" / "alignment.pt", weights_only=True))
    assert (alignment.dim, len(alignment.mean)) == (64, 64)
    assert (folder / "pretrain" / "alignment.png").read_bytes().startswith(b"\x89PNG")


def test_fine_tuning_starts_from_the_pretrained_student(finished, tmp_path):
    """With a learning rate of zero its convolutions are those that pre-training left."""
    folder, student = finished
    assert_same_weights(student.state_dict(), weights(folder / "finetune"))
    shutil.copytree(folder / "pretrain", tmp_path / "pretrain")
    run(tmp_path, "--resume", "--finetune-lr", "0", "--teacher-weights", str(folder / "teacher" / "model.pt"))
    pretrained, tuned = weights(folder / "pretrain"), weights(tmp_path / "finetune")
    convolutions = [name for name in pretrained if "conv" in name]
    assert all(torch.equal(tuned[name], pretrained[name]) for name in convolutions)
    assert not any(torch.equal(student.state_dict()[name], pretrained[name]) for name in convolutions)


def test_with_views_the_teacher_looks_once_and_a_killed_run_resumes_to_the_same_weights(
    finished, tmp_path, monkeypatch
):
    given = ("--teacher-weights", str(finished[0] / "teacher" / "model.pt"), "--views", "2", "--epochs", "3")
    looked = []
    look = PooledFeatures._output_of
    monkeypatch.setattr(PooledFeatures, "_output_of", lambda *args: looked.append(1) or look(*args))

    def train(name, *arguments):
        folder = tmp_path / name
        run(folder, *given, "--teacher-at", "layer3", "--feature-cache", str(tmp_path / "cache"), *arguments)
        return folder

    whole = train("whole")
    assert len(looked) == 3  # batches: two views of the training images, one of the test images
    with monkeypatch.context() as patch:
        kill_at_call(patch, accelerate.Accelerator, "backward", 5)
        with pytest.raises(Killed):
            train("killed")
    resumed = train("killed", "--resume")
    assert len(looked) == 3
    assert_same_weights(weights(resumed / "pretrain"), weights(whole / "pretrain"))


def test_a_run_resumes_from_wherever_its_folder_has_been_moved_to(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "moved")
    for written in ("pretrain", "finetune"):
        config = json.loads((tmp_path / "moved" / written / "config.json").read_text())
        assert str(finished[0]) not in json.dumps(config)
    monkeypatch.chdir(tmp_path)
    assert_same_weights(run("moved", "--resume").state_dict(), finished[1].state_dict())
    other = build_model("resnet8", 10)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=r"another configuration.*teacher_weights"):
        run("moved", "--resume", "--teacher-weights", str(tmp_path / "other.pt"))


@pytest.mark.parametrize(("fatal_step", "epochs_done"), [(1, 0), (3, 1)])
def test_stage_that_was_interrupted_resumes_to_the_same_weights(
    finished, tmp_path, monkeypatch, fatal_step, epochs_done
):
    folder, _ = finished
    given_teacher = ("--teacher-weights", str(folder / "teacher" / "model.pt"))
    with monkeypatch.context() as patch:
        kill_at_call(patch, accelerate.Accelerator, "backward", fatal_step)
        with pytest.raises(Killed):
            run(tmp_path, *given_teacher)
    assert len(metrics(tmp_path / "pretrain")) == epochs_done
    assert not (tmp_path / "finetune").exists()
    run(tmp_path, *given_teacher, "--resume")
    for stage in ("pretrain", "finetune"):
        assert_same_weights(weights(tmp_path / stage), weights(folder / stage))


def test_a_run_killed_before_its_teacher_has_an_epoch_resumes_to_the_same_weights(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at_call(patch, accelerate.Accelerator, "backward", 1)
        with pytest.raises(Killed):
            run(tmp_path)
    monkeypatch.setattr(pretrain_kdep, "pretrain", lambda folder, args: pytest.skip("far enough"))
    with pytest.raises(pytest.skip.Exception):
        run(tmp_path, "--resume")
    assert_same_weights(weights(tmp_path / "teacher"), weights(finished[0] / "teacher"))


def test_a_second_run_refuses_whichever_stage_the_first_is_in(tmp_path):
    lock = FolderLock(tmp_path)
    assert lock.acquire()
    for arguments in ([], ["--resume"], ["--teacher-weights", "some.pt"]):
        with pytest.raises(SystemExit, match=f"{tmp_path} is in use by process"):
            run(tmp_path, *arguments)
    lock.release()


def test_the_curves_of_pretraining_have_no_empty_panel(finished):
    panels = curves(metrics(finished[0] / "pretrain")).axes
    assert [len(axes.get_lines()) for axes in panels] == [2]


def test_started_run_is_not_overwritten(finished):
    folder, _ = finished
    with pytest.raises(SystemExit, match=r"holds a run: pass --resume"):
        run(folder)


def test_learnable_aligner_trains_on_the_features_at_a_named_place(finished, tmp_path):
    teacher = str(finished[0] / "teacher" / "model.pt")
    arguments = ("--teacher-weights", teacher, "--teacher-at", "layer3", "--aligner", "conv1x1", "--epochs", "1")
    run(tmp_path, *arguments)
    assert not (tmp_path / "teacher").exists()
    assert weights(tmp_path / "pretrain").keys() == build_model("resnet8", 10).state_dict().keys()


def test_weights_of_another_teacher_are_refused_with_the_file(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=r"--teacher-weights: .*other.pt does not fit resnet8 with 10 classes"):
        run(tmp_path / "run", "--teacher-weights", str(tmp_path / "other.pt"))


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut short", None])
def test_a_damaged_file_of_weights_is_one_line_that_leaves_the_folder_free(tmp_path, content):
    file = tmp_path / "damaged.pt"
    if content is not None:
        file.write_bytes(content)
    for _ in range(2):
        with pytest.raises(
            SystemExit, match=r"--teacher-weights: .*damaged\.pt is not a readable file of weights"
        ) as end:
            run(tmp_path / "run", "--teacher-weights", str(file))
        assert "\n" not in str(end.value)


def test_student_wider_than_its_teacher_is_refused(finished, tmp_path):
    teacher = str(finished[0] / "teacher" / "model.pt")
    with pytest.raises(SystemExit, match="dim must be at most 64"):
        run(tmp_path, "--teacher-weights", teacher, "--student", "wrn_16_2")


def test_classifier_of_another_size_is_left_out_of_the_initial_weights(tmp_path):
    other, model = build_model("resnet8", 7), build_model("resnet8", 10)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    classifier = model.fc.weight.clone()
    load_backbone(model, str(tmp_path / "other.pt"))
    assert torch.equal(model.conv1.weight, other.conv1.weight)
    assert torch.equal(model.fc.weight, classifier)


def test_initial_weights_of_another_model_are_refused_with_the_file(tmp_path):
    torch.save(build_model("wrn_16_2", 10).state_dict(), tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=r"--init: .*other.pt holds the weights of another model"):
        load_backbone(build_model("resnet8", 10), str(tmp_path / "other.pt"))


def in_one_of_two_processes(rank, folder):
    run(folder, "--epochs", "1")


def test_two_processes_fit_the_same_alignment_and_go_through_all_stages(tmp_path):
    run_ranks(in_one_of_two_processes, tmp_path, environment={"ACCELERATE_USE_CPU": "true"})
    assert json.loads((tmp_path / "pretrain" / "config.json").read_text())["processes"] == 2
    assert "test_accuracy" in json.loads((tmp_path / "finetune" / "summary.json").read_text())
