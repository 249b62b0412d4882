"""Kill a run of an example, read back what it has written, and compare weights."""

import json

import torch


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
