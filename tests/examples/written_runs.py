"""Kill a run of an example, read back what it has written, and compare weights."""

import json

import accelerate
import pytest
import torch

from common.checkpoint_files import checkpoints


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


class Killed(BaseException):
    """Ends a run in this process as a kill would: nothing in the run catches it."""


def kill_at_call(monkeypatch, owner, name, number):
    """Let the call with this number of a function raise :class:`Killed`."""
    original, calls = getattr(owner, name), []

    def fatal(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, fatal)


def assert_killed_run_resumes(monkeypatch, train, folder, undisturbed, fatal_step, left):
    """Kill ``train(folder)`` in a step, which leaves the checkpoints `left`; resumed, it ends with the same weights."""
    with monkeypatch.context() as patch:
        kill_at_call(patch, accelerate.Accelerator, "backward", fatal_step)
        with pytest.raises(Killed):
            train(folder)
    assert [path.name for path in checkpoints(folder)] == left
    train(folder, "--resume")
    assert_same_weights(weights(folder), weights(undisturbed))
