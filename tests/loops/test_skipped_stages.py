"""Stages that a forward skips: left out in that step, and named if they never fire."""

import random
import warnings

import pytest
import torch
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

import sfr


class Skipping(nn.Module):
    """Four convolutions of one width; those of `skipped` are left out."""

    def __init__(self):
        super().__init__()
        self.skipped = set()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        for index, layer in enumerate(self.layers):
            x = x if index in self.skipped else layer(x).relu()
        return self.fc(x.mean((2, 3)))


STAGES = ["stem", "layers.0", "layers.1", "layers.2"]


def pairs_of(model, criterion, batch, skipped):
    model.skipped.clear()
    model.skipped.update(skipped)
    criterion(model(batch[0]), batch[1]).backward()
    return set(criterion.last.pairs)


def test_pairs_without_both_sides_are_left_out_in_that_step(batch):
    model = sfr.SFRWrapper(Skipping(), stages=STAGES)
    criterion = sfr.SFRLoss(model)
    whole = {f"{a} <- {b}" for i, a in enumerate(STAGES) for b in STAGES[i + 1 :]}
    for skipped in ({1}, set(), {0, 2}, {0, 1, 2}, {2}):
        pairs = pairs_of(model, criterion, batch, skipped)
        assert pairs == {pair for pair in whole if not any(f"layers.{index}" in pair for index in skipped)}
    assert criterion.step == 5


@pytest.mark.parametrize("skipped", [{1}, set()])
@pytest.mark.parametrize("pairs", ["last", [("stem", "layers.2"), (1, -1), (0, 2)]])
def test_pairs_by_name_and_number_mean_the_same_stages_whatever_is_missing(batch, pairs, skipped):
    model = sfr.SFRWrapper(Skipping(), stages=STAGES)
    criterion = sfr.SFRLoss(model, pairs=pairs)
    expected = pairs_of(model, criterion, batch, set())
    assert "layers.0 <- layers.2" in expected
    actual = pairs_of(model, criterion, batch, skipped)
    assert actual == {pair for pair in expected if not skipped or "layers.1" not in pair}


def test_stages_named_in_another_order_than_they_run_keep_their_places(batch):
    model = sfr.SFRWrapper(Skipping(), stages=STAGES[::-1])
    criterion = sfr.SFRLoss(model, pairs=[(0, 1), (2, 3)])
    assert pairs_of(model, criterion, batch, set()) == {"stem <- layers.0", "layers.1 <- layers.2"}
    assert pairs_of(model, criterion, batch, {0}) == {"layers.1 <- layers.2"}


def test_a_step_that_skips_all_stages_is_the_label_term(batch):
    model = sfr.SFRWrapper(Skipping(), stages=STAGES[1:])
    criterion = sfr.SFRLoss(model)
    assert pairs_of(model, criterion, batch, {0, 1, 2}) == set()
    assert criterion.last.feature == 0
    assert pairs_of(model, criterion, batch, {0}) == {"layers.1 <- layers.2"}


def warnings_of(step, steps):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            step()
    return caught


def test_a_stage_that_never_fires_is_named_once(batch):
    model = sfr.SFRWrapper(Skipping(), stages=STAGES)
    criterion = sfr.SFRLoss(model)
    assert not warnings_of(lambda: pairs_of(model, criterion, batch, {1}), 9)
    [warning] = warnings_of(lambda: pairs_of(model, criterion, batch, {1}), 200)
    assert "stage(s) ['layers.1'] did not fire in 10 forwards in a row" in str(warning.message)
    assert warning.filename == __file__


def test_a_stage_that_stops_to_fire_is_named_once(batch):
    model = sfr.SFRWrapper(Skipping(), stages=STAGES)
    criterion = sfr.SFRLoss(model)
    for _ in range(2):  # the first one is watched
        pairs_of(model, criterion, batch, set())
    assert not warnings_of(lambda: pairs_of(model, criterion, batch, {1}), 99)
    assert len(warnings_of(lambda: pairs_of(model, criterion, batch, {1}), 110)) == 1


@pytest.mark.parametrize("stages", [None, r"wav2vec2.encoder.layers.\d"], ids=["discovered", "named"])
def test_layers_dropped_at_random_train(stages):
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    config = Wav2Vec2Config(**small, **convolutions, **positions, num_labels=10, layerdrop=0.5)
    model = sfr.SFRWrapper(Wav2Vec2ForSequenceClassification(config).train(), stages=stages)
    criterion = sfr.SFRLoss(model)
    random.seed(0)
    counts = []
    for _ in range(12):
        criterion(model(torch.randn(2, 800)), torch.tensor([1, 2])).backward()
        counts.append(len(criterion.last.pairs))
    assert len(set(counts)) > 1
    assert criterion.step == 12


def test_a_stage_whose_parts_run_without_it_is_an_error_whether_watched_in_training_or_before(batch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
            self.last = nn.Conv2d(8, 10, 3)

        def forward(self, x):
            for part in self.body:
                x = part(x)
            return self.last(x).mean((2, 3))

    for example in ({}, {"example_input": batch[0]}):
        with pytest.raises(RuntimeError, match=r"\['body'\] did not fire.*parent calls its parts"):
            sfr.SFRWrapper(Net(), stages=["body", "last"], **example)(batch[0])


def test_a_stage_that_was_replaced_later_is_an_error(batch):
    model = sfr.SFRWrapper(Skipping(), stages=STAGES)
    criterion = sfr.SFRLoss(model)
    for _ in range(2):
        pairs_of(model, criterion, batch, set())
    model.stem = nn.Conv2d(3, 8, 3, 2, 1)
    with pytest.raises(RuntimeError, match=r"\['stem'\] did not fire.*replaced after wrapping"):
        model(batch[0])
