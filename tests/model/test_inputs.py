"""The first step has its feature term whatever the model is called with: lists, dataclasses, nested containers."""

from collections import namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sfr


@dataclass
class Images:
    pixels: torch.Tensor
    name: str = "images"


@dataclass
class Nested:
    inner: Images
    scales: list[float] = field(default_factory=lambda: [1.0])


class Plain:
    def __init__(self, pixels):
        self.pixels, self.size = pixels, (16, 16)


Pair = namedtuple("Pair", ["note", "pixels"])
Loader = namedtuple("Loader", ["put", "take"])

INPUTS = {
    "tensor": Loader(lambda x: x, lambda x: x),
    "list of images": Loader(list, torch.stack),
    "tuple of images": Loader(tuple, lambda images: torch.stack(list(images))),
    "dict of images": Loader(lambda x: {"images": list(x)}, lambda batch: torch.stack(batch["images"])),
    "list of dicts": Loader(lambda x: [{"image": i} for i in x], lambda b: torch.stack([each["image"] for each in b])),
    "dataclass": Loader(Images, lambda images: images.pixels),
    "nested dataclass": Loader(lambda x: Nested(Images(x)), lambda nested: nested.inner.pixels),
    "named tuple": Loader(lambda x: Pair("note", x), lambda pair: pair.pixels),
    "object": Loader(Plain, lambda plain: plain.pixels),
    "nothing to look into": Loader(lambda x: lambda: x, lambda function: function()),
    "two tensors in a list": Loader(lambda x: [x, x.flip(3)], lambda both: both[0] + both[1]),
}


class Net(nn.Module):
    """A frozen body, of which the graph keeps nothing, and a trained rest."""

    def __init__(self, take, frozen):
        super().__init__()
        self.take = take
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.rest = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(16, 10)
        self.body.requires_grad_(not frozen)

    def forward(self, batch):
        return self.head(self.rest(self.body(self.take(batch))).mean((2, 3)))


def pairs_of_two_steps(model, criterion, put, parallel=None):
    pairs = []
    for _ in range(2):
        criterion((parallel or model)(put(torch.randn(5, 3, 16, 16))), torch.arange(5)).backward()
        pairs.append(set(criterion.last.pairs))
    return pairs


@pytest.mark.filterwarnings("ignore:all the supervised stages are frozen")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen body", "trained"])
@pytest.mark.parametrize("kind", INPUTS)
def test_the_first_step_has_the_pairs_of_the_second_whatever_holds_the_images(kind, frozen):
    put, take = INPUTS[kind]
    model = sfr.SFRWrapper(Net(take, frozen))
    first, second = pairs_of_two_steps(model, sfr.SFRLoss(model), put)
    assert first == second
    assert len(first) == 3


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:all the supervised stages are frozen")
@pytest.mark.parametrize("kind", INPUTS)
def test_so_it_has_under_ddp(one_process, kind):
    put, take = INPUTS[kind]
    model = sfr.SFRWrapper(Net(take, frozen=True))
    first, second = pairs_of_two_steps(model, sfr.SFRLoss(model), put, DistributedDataParallel(model))
    assert first == second
    assert len(first) == 3


def test_a_detector_that_takes_a_list_of_images_and_returns_a_loss_has_its_stages_found():
    class Detector(Net):
        def forward(self, batch):
            return {"loss": super().forward(batch).square().mean()}

    model = sfr.SFRWrapper(Detector(torch.stack, frozen=False))
    criterion = sfr.SFRLoss(model, label_loss=lambda output, _: output["loss"])
    for _ in range(2):
        criterion(model(list(torch.randn(5, 3, 16, 16))), None).backward()
        assert len(criterion.last.pairs) == 3
