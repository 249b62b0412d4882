"""One policy for what a model returns: the criterion, the report and the search for stages read the same logits."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

import sfr
from sfr.model.outputs import feature_of, features_in, logits_in, the_logits

Z, OTHER, SCALAR = torch.randn(8, 10), torch.randn(8, 3), torch.tensor(0.5)
Named = namedtuple("Named", ["loss", "logits"])


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Attributes:
    def __init__(self, loss, logits):
        self.loss, self.logits = loss, logits


CLEAR = {
    "tensor": lambda z: z,
    "mapping": lambda z: OrderedDict(aux_loss=SCALAR, logits=z),
    "mapping of segmentation": lambda z: {"features": OTHER, "out": z},
    "ModelOutput": lambda z: ImageClassifierOutput(loss=SCALAR, logits=z, hidden_states=(OTHER,)),
    "named tuple": lambda z: Named(SCALAR, z),
    "dataclass": lambda z: Output(SCALAR, z),
    "namespace": lambda z: SimpleNamespace(loss=SCALAR, logits=z),
    "object": lambda z: Attributes(SCALAR, z),
    "tuple of one": lambda z: (z,),
}
UNCLEAR = {
    "tuple": lambda z: (z, OTHER),
    "tuple that begins with a loss": lambda z: (SCALAR, z),
    "mapping by another name": lambda z: {"loss": SCALAR, "scores": z},
    "nested": lambda z: {"result": {"scores": z}},
}


@pytest.mark.parametrize("pack", CLEAR.values(), ids=CLEAR)
def test_the_logits_of_a_clear_output_are_found_by_everybody(pack):
    assert the_logits(pack(Z)) is logits_in(pack(Z)) is Z


@pytest.mark.parametrize("pack", UNCLEAR.values(), ids=UNCLEAR)
def test_of_an_unclear_output_the_first_with_classes_is_looked_at_and_nothing_trained(pack):
    assert logits_in(pack(Z)) is Z
    with pytest.raises(TypeError, match="output must"):
        the_logits(pack(Z))


def test_an_output_of_numbers_alone_gives_the_first_and_one_without_gives_none():
    assert logits_in({"class": SCALAR, "box": torch.tensor(1.0)}) is SCALAR
    assert logits_in([None, torch.tensor([1])]) is None


@pytest.mark.parametrize("logits", [torch.tensor([[1, 2]]), None, "scores"])
def test_logits_that_are_no_floating_tensor_are_none(logits):
    with pytest.raises(TypeError, match="logits"):
        the_logits({"logits": logits, "other": Z})


def test_auxiliary_logits_are_refused_whatever_holds_them():
    with pytest.raises(ValueError, match=r"criterion\(output.out, target\) \+ 0.5 \* F.cross_entropy\(output.aux,"):
        the_logits(SimpleNamespace(out=Z, aux=Z))
    with pytest.raises(ValueError, match=r"F.cross_entropy\(output.aux1, target\) \+ 0.5 \* .*\(output.aux2, target\)"):
        the_logits(SimpleNamespace(logits=Z, aux1=Z, aux2=Z, aux3=None, aux_loss=SCALAR))


@pytest.mark.parametrize(
    "output", [Z, (Z, OTHER), [Z], {"hidden": Z, "n": 3}, BaseModelOutput(last_hidden_state=Z), Named(Z, OTHER)]
)
def test_the_feature_of_a_stage_is_the_first_floating_tensor_of_its_output(output):
    assert feature_of("layer1", output) is features_in(output)[0] is Z


@pytest.mark.parametrize("output", [None, torch.tensor([1]), (), {"n": 3}, [None]])
def test_a_stage_without_a_floating_tensor_is_an_error_that_names_it(output):
    assert features_in(output) == []
    with pytest.raises(TypeError, match=r"stage 'layer1' returns no floating-point tensor but .*stages="):
        feature_of("layer1", output)


class Packing(nn.Module):
    def __init__(self, net, pack):
        super().__init__()
        self.net, self.pack = net, pack

    def forward(self, x):
        return self.pack(self.net(x))


@pytest.mark.parametrize("pack", CLEAR.values(), ids=CLEAR)
def test_stages_training_and_report_are_those_of_the_model_that_returns_its_logits(make_net, batch, pack):
    torch.manual_seed(0)
    plain = make_net()
    expected = F.cross_entropy(plain(batch[0]), batch[1])
    model = sfr.SFRWrapper(Packing(plain, pack))
    criterion = sfr.SFRLoss(model, smoothing="none")
    criterion(model(batch[0]), batch[1]).backward()
    assert model.sfr.stage_names == ("net.1", "net.3", "net.5")
    torch.testing.assert_close(criterion.last.label, expected.detach())
    assert "on random labels" in str(model.report(batch[0], repeats=1))


class Ragged(nn.Module):
    """Layers whose outputs are nested, or packed, and a mean of each text."""

    def __init__(self, recurrent=False):
        super().__init__()
        self.first = nn.GRU(8, 16, batch_first=True) if recurrent else nn.Linear(8, 16)
        self.second, self.third, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        if isinstance(self.first, nn.GRU):
            x = pad_packed_sequence(self.first(x)[0], batch_first=True)[0].mean(dim=1)
        else:
            x = torch.stack([each.mean(dim=0) for each in self.first(x).relu().unbind()])
        return self.head(self.third(self.second(x).relu()).relu())


TEXTS = [torch.randn(5, 8), torch.randn(3, 8)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_go_through_a_model_and_cannot_be_stages(layout):
    texts = torch.nested.nested_tensor(TEXTS, layout=layout)
    model = sfr.SFRWrapper(Ragged())
    criterion = sfr.SFRLoss(model)
    for _ in range(2):
        criterion(model(texts), torch.tensor([0, 1])).backward()
    assert "first" not in model.sfr.stage_names
    assert criterion.last.feature > 0
    model.unwrap()
    with pytest.raises(TypeError, match="stage 'first' returns no floating-point tensor but a nested one"):
        sfr.SFRWrapper(model, stages=["first", "second"])(texts)


def test_a_packed_sequence_as_a_stage_is_an_error_that_says_how_to_unpack_it():
    packed = pack_sequence(TEXTS)
    model = sfr.SFRWrapper(Ragged(recurrent=True))
    criterion = sfr.SFRLoss(model)
    for _ in range(2):
        criterion(model(packed), torch.tensor([0, 1])).backward()
    assert criterion.last.feature > 0
    model.unwrap()
    with pytest.raises(TypeError, match=r"stage 'first' returns a packed sequence.*pad_packed_sequence"):
        sfr.SFRWrapper(model, stages=["first", "second"])(packed)
