"""A run holds its folder alone, numbers it itself, and resumes from the newest checkpoint that is sound."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from processes import run_ranks
from torch import nn
from written_runs import metrics

from common import run_folder
from common.checkpoint_files import checkpoints, damage, seal
from common.folder_lock import FolderLock
from common.run_folder import RunFolder, claimed, curves, newest_sound

CONFIG = {"lr": 0.1, "sizes": (1, 2)}
SAVED = (
    *("criterion.pt", "metrics.jsonl", "model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"),
    "manifest.json",
)


class Weighted(nn.Module):
    """A criterion with a state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))


def small_run(folder, epochs):
    """The folder of a run whose epochs draw some random numbers and count them in model and criterion."""
    accelerator, model, criterion = accelerate.Accelerator(), nn.Linear(2, 2), Weighted()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer, _ = accelerator.prepare(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    with claimed(folder, folder, CONFIG, resume=folder.exists()) as run:
        run.restore(accelerator, criterion)
        run.start()
        for epoch in range(run.epochs_done + 1, epochs + 1):
            criterion.seen += torch.rand(3)
            model(torch.rand(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append({"epoch": epoch})
            run.save_checkpoint(accelerator, epoch, criterion)
    return [*model.parameters(), criterion.seen]


@pytest.fixture
def run(tmp_path):
    """Three epochs, of which two checkpoints are left, and what they ended with."""
    torch.manual_seed(1)
    return tmp_path / "run", small_run(tmp_path / "run", epochs=3)


def files_of(checkpoint):
    return sorted(file.name for file in checkpoint.iterdir())


def test_two_checkpoints_are_kept_each_with_a_manifest_of_its_files(run):
    folder, _ = run
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-0002", "checkpoint-0003"]
    for checkpoint in checkpoints(folder):
        assert files_of(checkpoint) == sorted(SAVED)
        assert sorted([*json.loads((checkpoint / "manifest.json").read_text()), "manifest.json"]) == sorted(SAVED)
        assert damage(checkpoint) is None


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "missing": (Path.unlink, "is missing"),
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "does not match"),
    "a bit flipped": (flip_a_bit, "does not match"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "is unreadable"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_of_every_file_is_found_and_the_file_named(run, tmp_path, kind):
    harm, told = DAMAGES[kind]
    for name in SAVED:
        checkpoint = tmp_path / name / "checkpoint-0003"
        shutil.copytree(run[0] / "checkpoint-0003", checkpoint)
        harm(checkpoint / name)
        fault = damage(checkpoint)
        if name != "manifest.json":
            assert fault.startswith(f"checkpoint-0003/{name} {told}")
        else:
            assert fault.startswith("checkpoint-0003/")


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", "3", "\xff", '{"model.safetensors": 3}', '{"model.safetensors": null}']
)
def test_a_manifest_that_is_none_is_damage(run, text):
    checkpoint = run[0] / "checkpoint-0003"
    (checkpoint / "manifest.json").write_bytes(text.encode("latin1"))
    assert damage(checkpoint) is not None


@pytest.mark.parametrize("name", SAVED)
def test_resume_from_the_checkpoint_before_a_damaged_one_ends_as_if_nothing_had_been(run, capsys, name):
    folder, undisturbed = run
    (folder / "checkpoint-0003" / name).write_bytes(b"")
    resumed = small_run(folder, epochs=3)
    assert all(map(torch.equal, resumed, undisturbed))
    said = capsys.readouterr().out
    assert f"checkpoint-0003/{name} is " in said
    assert "looking for the checkpoint before" in said
    assert [record["epoch"] for record in metrics(folder)] == [1, 2, 3]
    assert [damage(path) for path in checkpoints(folder)] == [None, None]


def test_without_a_sound_checkpoint_the_error_is_short_and_names_every_damaged_file(run):
    folder, _ = run
    (folder / "checkpoint-0002" / "optimizer.bin").unlink()
    flip_a_bit(folder / "checkpoint-0003" / "model.safetensors")
    with pytest.raises(
        SystemExit, match=r"no sound checkpoint.*3/model\.safetensors.*2/optimizer\.bin is missing"
    ) as end:
        small_run(folder, epochs=3)
    assert "\n" not in str(end.value)
    assert damage(folder / "checkpoint-0003") is not None  # nothing has been deleted or written


def test_a_file_in_the_place_of_a_checkpoint_is_replaced(run):
    folder, undisturbed = run
    shutil.rmtree(folder / "checkpoint-0003")
    (folder / "checkpoint-0003").write_text("no folder")
    assert all(map(torch.equal, small_run(folder, epochs=3), undisturbed))
    assert damage(folder / "checkpoint-0003") is None


def test_what_a_kill_has_left_of_an_older_checkpoint_is_in_nobodys_way(run):
    folder, undisturbed = run
    (folder / "checkpoint-0001").mkdir()
    (folder / "checkpoint-old").mkdir()
    assert newest_sound(folder) == folder / "checkpoint-0003"
    assert all(map(torch.equal, small_run(folder, epochs=3), undisturbed))


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(run):
    folder, _ = run
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit, match="without its configuration or its checkpoints"):
        small_run(folder, epochs=3)
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_run_without_its_configuration_is_not_overwritten(run):
    (run[0] / "config.json").unlink()
    with pytest.raises(SystemExit, match="without its configuration"):
        small_run(run[0], epochs=3)


@pytest.mark.parametrize("text", ["", "{", "null", "3", "\xff"])
def test_a_damaged_configuration_is_named(run, text):
    (run[0] / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(SystemExit, match=r"config\.json is damaged"):
        small_run(run[0], epochs=3)


def test_random_states_that_cannot_be_read_are_an_error_though_accelerate_goes_on(run):
    checkpoint = run[0] / "checkpoint-0003"
    torch.save({"random_state": "of another version"}, checkpoint / "random_states_0.pkl")
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)
    with pytest.raises(SystemExit, match=r"random states .* cannot be read"):
        small_run(run[0], epochs=3)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_the_state_of_the_criterion_cannot_execute_code(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = run[0] / "checkpoint-0003"
    torch.save(Attack(), checkpoint / "criterion.pt")
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)
    with pytest.raises(pickle.UnpicklingError):
        small_run(run[0], epochs=3)
    assert not Path("executed").exists()


def test_every_file_is_on_the_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename

    def noted_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_rename(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    small_run(tmp_path / "run", epochs=1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(SAVED) <= set(before)
    assert before[-2:] == ["manifest.json", "checkpoint.partial"]
    assert after[0] == "run"


def test_a_folder_that_lacks_the_states_of_other_machines_is_an_error(tmp_path):
    partial = tmp_path / "checkpoint.partial"
    partial.mkdir()
    (partial / "random_states_0.pkl").touch()
    with pytest.raises(
        SystemExit, match="states of 1 of 2 processes; it must be on a file system that all machines share"
    ):
        RunFolder(tmp_path)._check_complete(partial, processes=2)


def claim(chosen, default="runs/name", resume=False):
    return claimed(chosen, Path(default), CONFIG, resume)


def begin(**how):
    """Claim a folder as a run that begins and ends; return its name."""
    with claim(None, **how) as run:
        run.start()
    return run.path.name


def test_a_folder_in_use_is_refused_whether_resumed_or_not(tmp_path):
    with claim(tmp_path):
        for resume in (False, True):
            refusal = rf"{tmp_path} is in use by process {os.getpid()} on .*: wait .* or pass another --output-dir"
            with pytest.raises(SystemExit, match=refusal), claim(tmp_path, resume=resume):
                pytest.fail("two runs in one folder")


def test_the_folder_of_a_link_is_the_same_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with claim(tmp_path / "folder"), pytest.raises(SystemExit, match="in use"), claim(tmp_path / "link"):
        pytest.fail("two runs in one folder")


HOLDER = """
import os, sys, time
from pathlib import Path
from common.folder_lock import FolderLock
assert FolderLock(Path(sys.argv[1])).acquire()
if not os.fork():  # as a data-loading process, which lives on for a while when its parent is killed
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_run_is_gone_at_once_though_its_loading_processes_live_on(tmp_path, importing_examples):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], env=importing_examples, stdout=subprocess.PIPE)
    child = int(holder.stdout.readline())
    try:
        assert not FolderLock(tmp_path).acquire()
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives
        with claim(tmp_path, resume=True):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .*make sure that no other run"):
        assert FolderLock(tmp_path).acquire()


def test_runs_of_one_name_number_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [begin(), begin(), begin()] == ["name", "name-2", "name-3"]


def test_a_run_of_the_same_name_that_is_just_starting_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with claim(None) as first, claim(None) as second:
        assert (first.path.name, second.path.name) == ("name", "name-2")


def test_resume_takes_the_newest_of_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(11):
        begin()
    Path("runs/name-of-another-99").mkdir()
    Path("runs/name-of-another-99/config.json").touch()
    assert begin(resume=True) == "name-11"
    shutil.rmtree("runs/name-4")
    assert begin() == "name-12"


def test_resume_where_nothing_is_starts_in_the_first_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert begin(resume=True) == "name"
    assert begin(resume=True) == "name"


def test_another_configuration_in_the_newest_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin()
    other = claimed(None, Path("runs/name"), {**CONFIG, "lr": 0.2}, True)
    with pytest.raises(SystemExit, match=r"another configuration than runs/name's: lr was 0\.1, is 0\.2"), other:
        pytest.fail("resumed")


def end(claimed_folder, error, begun):
    with claimed_folder as run:
        if begun:
            run.start()
        raise error


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_run_that_ends_before_its_first_step_leaves_its_folder_free(tmp_path, error):
    with pytest.raises(error):
        end(claim(tmp_path / "run"), error, begun=False)
    assert not (tmp_path / "run/config.json").exists()
    with claim(tmp_path / "run"):
        assert (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_ends_later_can_only_be_resumed(tmp_path, error):
    with pytest.raises(error):
        end(claim(tmp_path / "run"), error, begun=True)
    with pytest.raises(SystemExit, match="holds a run: pass --resume"), claim(tmp_path / "run"):
        pytest.fail("overwritten")
    with claim(tmp_path / "run", resume=True) as resumed:
        assert resumed.epochs_done == 0


def claims_twice(rank, folder):
    """Return how a run began, and how the next one into its folder did."""
    outcomes, main = [], accelerate.Accelerator().is_main_process
    for _ in range(2):
        try:
            with claim(folder) as run:
                if main:
                    run.start()
                outcomes.append(f"begun in {run.path.name}")
        except SystemExit as end:
            outcomes.append(f"refused: {end}")
    return outcomes


def test_over_two_processes_one_claims_and_all_go_or_none(tmp_path):
    ranks = run_ranks(claims_twice, tmp_path / "folder", environment={"ACCELERATE_USE_CPU": "true"})
    first, second = zip(*ranks, strict=True)
    assert first == ("begun in folder",) * 2
    message = f"{tmp_path}/folder holds a run: pass --resume or another --output-dir"
    assert sorted(second) == sorted([f"refused: {message}", "refused: 1"])  # one says why, the other ends quietly


def test_curves_have_a_panel_only_for_what_was_measured():
    losses = [{"epoch": 1, "step": 2, "train_loss": 2.0, "test_loss": 2.0}]
    assert [axes.get_ylabel() for axes in curves(losses).axes] == ["loss"]
    both = [record | {"test_accuracy": 0.5} for record in losses]
    figure = curves(both)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "share"]
    assert all(axes.get_lines() for axes in figure.axes)
    accuracies = [{"epoch": 1, "first_knn_accuracy": 0.5}]
    assert [axes.get_ylabel() for axes in curves(accuracies).axes] == ["share"]


def test_the_module_keeps_as_many_checkpoints_as_it_says():
    assert run_folder.KEPT == 2
