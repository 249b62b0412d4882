"""FSDP2 knows the wrapped model: a ViT, whose root has parameters, trains, validates, saves and loads sharded."""

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from processes import run_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import ProcessRaisedException
from torchvision.models import VisionTransformer

import sfr

RANKS, BATCH = 2, 8
SHARDED = ["wrapped, then sharded", "sharded, then wrapped"]
NO_CPU_STREAM = "PyTorch before 2.7 cannot run FSDP2 on the CPU: https://github.com/pytorch/pytorch/pull/145935"

pytestmark = pytest.mark.xfail(
    torch.__version__.startswith("2.6."), raises=ProcessRaisedException, strict=True, reason=NO_CPU_STREAM
)


def transformer() -> VisionTransformer:
    """Return a ViT, which has parameters of its own at its root."""
    torch.manual_seed(0)
    net = VisionTransformer(16, 4, 4, 2, 24, 48, num_classes=10)
    torch.nn.init.normal_(net.heads.head.weight, std=0.1)
    return net


def sharded(net: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in [*net.encoder.layers, net]:
        fully_shard(block, mesh=mesh)
    return net


def build(kind: str) -> tuple[torch.nn.Module, sfr.SFRLoss]:
    """Return the model to call and its criterion."""
    net = transformer()
    if kind == "one process":
        model = sfr.SFRWrapper(net)
    elif kind == "wrapped, then sharded":
        model = sharded(sfr.SFRWrapper(net))
    else:
        model = sfr.SFRWrapper(sharded(net))
    return model, sfr.SFRLoss(model, feature_weight=0.5)


def train(rank: int, kind: str, folder: str) -> dict[str, Any]:
    """Train three steps, validating after each, save the model, and load it into a fresh one."""
    warnings.simplefilter("ignore")  # PyTorch's own, of what it shards
    model, criterion = build(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.randn(3, BATCH, 3, 16, 16), torch.arange(BATCH)
    share = slice(None) if kind == "one process" else slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
    features = []
    for batch in images:
        model.train()
        criterion(model(batch[share]), labels[share]).backward()
        optimizer.step()
        optimizer.zero_grad()
        features.append(criterion.last.feature)
        model.eval()
        with torch.no_grad():
            validation = F.cross_entropy(model(images[0]), labels)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    result = {"weights": copy.deepcopy(weights), "features": torch.stack(features), "validation": validation}
    if kind != "one process":
        state = get_model_state_dict(model)
        dcp.save(state, checkpoint_id=f"{folder}/{kind}")
        fresh, _ = build(kind)
        empty = get_model_state_dict(fresh)
        dcp.load(empty, checkpoint_id=f"{folder}/{kind}")
        set_model_state_dict(fresh, empty)
        with torch.no_grad():
            result["loaded"] = F.cross_entropy(fresh.eval()(images[0]), labels)
        result["names"] = list(model.state_dict())  # with the hooks that PyTorch registers on the very model
        result["kind"] = [type(sfr.unwrap(criterion.model)).__name__, isinstance(criterion.model, sfr.SFRWrapper)]
        with torch.no_grad():
            result["unwrapped"] = F.cross_entropy(model(images[0]), labels)
    return result


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return a function that gives what the ranks of a kind have found, and trains them when first asked for."""
    folder = str(tmp_path_factory.mktemp("sharded"))
    return functools.cache(lambda kind: run_ranks(train, kind, folder, ranks=RANKS if kind in SHARDED else 1))


@pytest.mark.parametrize("kind", SHARDED)
def test_sharding_changes_neither_weights_nor_validation(ranks, kind):
    [whole], parts = ranks("one process"), ranks(kind)
    torch.testing.assert_close(parts[0]["weights"], whole["weights"], rtol=1e-4, atol=1e-5)
    for part in parts:
        torch.testing.assert_close(part["validation"], whole["validation"], rtol=1e-4, atol=1e-5)
    features = torch.stack([part["features"] for part in parts]).mean(0)
    torch.testing.assert_close(features, whole["features"], rtol=1e-4, atol=1e-5)
    assert (features > 0).all()


@pytest.mark.parametrize("kind", SHARDED)
def test_a_distributed_checkpoint_loads_into_a_fresh_model(ranks, kind):
    for part in ranks(kind):
        torch.testing.assert_close(part["loaded"], part["validation"])


@pytest.mark.parametrize("kind", SHARDED)
def test_names_in_the_state_are_those_of_the_plain_model(ranks, kind):
    [whole] = ranks("one process")
    for part in ranks(kind):
        assert part["names"] == list(whole["weights"])


@pytest.mark.parametrize("kind", SHARDED)
def test_the_model_can_be_unwrapped_while_sharded(ranks, kind):
    for part in ranks(kind):
        assert part["kind"] == ["FSDPVisionTransformer", False]
        torch.testing.assert_close(part["unwrapped"], part["validation"])
