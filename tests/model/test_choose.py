"""The rule of the stages, on hand-made traces: no model runs."""

from collections import Counter

import pytest
import torch
from torch import nn

import sfr
from sfr.model.choose import choose, even_places
from sfr.model.formats import View
from sfr.model.trace import Sighting, Trace


class Block(nn.Module):
    """A block of one layer."""

    def __init__(self):
        super().__init__()
        self.layer = conv()


def conv():
    return nn.Conv2d(8, 8, 3)


def seen(name, module, size, **known):
    """Return the sighting of a map of this many rows and columns; 0 means one without a batch."""
    return Sighting(
        name, module, (2, 8, size, size), view=View("channels_first") if size else None, cells=size * size, **known
    )


def traced(*sightings, again=(), classes=10):
    names = [sighting.name for sighting in sightings]
    return Trace(
        sightings=sightings,
        calls=Counter([*names, *again]),
        counts=Counter(type(sighting.module) for sighting in sightings),
        logits_shape=(2, classes),
        batch=2,
    )


def test_the_last_output_at_each_resolution_is_a_stage():
    trace = traced(*(seen(name, conv(), size) for name, size in (("a", 16), ("b", 16), ("c", 8), ("d", 4), ("e", 4))))
    assert list(choose(trace)) == ["b", "c", "e"]


def test_of_a_decoder_nothing_is_a_stage():
    trace = traced(*(seen(name, conv(), size) for name, size in (("down", 16), ("lowest", 8), ("up", 16))))
    assert list(choose(trace)) == ["down", "lowest"]


def test_a_module_called_twice_is_no_stage():
    sightings = (seen("a", conv(), 16), seen("b", conv(), 8), seen("b", conv(), 8), seen("c", conv(), 4))
    assert list(choose(traced(*sightings))) == ["a", "c"]


def test_what_is_not_of_the_whole_batch_or_one_of_several_outputs_is_no_stage():
    sightings = (
        seen("a", conv(), 32),
        seen("b", conv(), 0),
        seen("c", conv(), 16, sole=False),
        seen("d", conv(), 8),
    )
    assert list(choose(traced(*sightings))) == ["a", "d"]


def test_the_classifier_and_what_comes_after_it_are_no_stages():
    sightings = (seen("a", conv(), 16), seen("b", conv(), 8), seen("classifier", conv(), 4), seen("last", nn.ReLU(), 4))
    assert list(choose(traced(*sightings))) == ["a", "b", "last"]
    assert list(choose(traced(*sightings, classes=8))) == ["a", "b"]


def test_equal_blocks_that_hold_most_layers_are_stages_evenly_spaced_in_depth():
    blocks = [Block() for _ in range(8)]
    sightings = [seen("stem", conv(), 32)]
    for place, block in enumerate(blocks):
        sightings += [seen(f"blocks.{place}.layer", block.layer, 4), seen(f"blocks.{place}", block, 4)]
    assert list(choose(traced(*sightings))) == [f"blocks.{place}" for place in (1, 3, 5, 7)]
    assert even_places(8) == [1, 3, 5, 7]


def test_the_outermost_module_is_preferred_to_a_later_one_inside_a_block():
    first, second = Block(), Block()
    sightings = (
        seen("first", first, 16),
        seen("second.layer", second.layer, 16),
        seen("second.down", conv(), 8),
        seen("second", second, 8),
    )
    assert list(choose(traced(*sightings))) == ["first", "second"]


def test_fewer_than_two_stages_are_an_error_with_what_was_seen():
    with pytest.raises(ValueError, match=r"found 1 stage\(s\) \['a'\] in the model, two are needed"):
        choose(traced(seen("a", conv(), 16)))
    with pytest.raises(ValueError, match=r"no output has the batch, 2, as its first axis: 'a'"):
        choose(traced(seen("a", conv(), 0)))
    with pytest.raises(ValueError, match="the forward has called none of its submodules"):
        choose(traced())
    with pytest.raises(ValueError, match="no submodule has returned a floating-point tensor"):
        choose(traced(again=["a"]))
    with pytest.raises(ValueError, match="ran more than once in the forward, as 'a'"):
        choose(traced(seen("a", conv(), 16), again=["a"]))
    with pytest.raises(ValueError, match=r"1 output\(s\) cannot be read; 'a': is odd"):
        choose(traced(seen("a", conv(), 0, problem="is odd")))


def test_a_model_that_joins_its_inputs_into_one_batch_is_told_to_name_its_stages():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
            self.encoder = nn.Sequential(*layers, nn.Flatten())
            self.head = nn.Linear(32, 2)

        def forward(self, a, b):
            return self.head(torch.cat(self.encoder(torch.cat([a, b])).chunk(2), dim=1))

    images = torch.randn(4, 3, 16, 16)
    with pytest.raises(ValueError, match=r"do not have the batch, 4, as their first axis, as 'encoder.*named"):
        sfr.SFRWrapper(Siamese(), example_input=(images, images))
    model = sfr.SFRWrapper(Siamese(), stages=["encoder.0", "encoder.2"])
    sfr.SFRLoss(model)(model(images, images), torch.tensor([0, 1, 0, 1])).backward()
