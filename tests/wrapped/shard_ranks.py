"""Two processes that shard a wrapped vision transformer, train, validate, save and load it; see test_sharded.py."""

from __future__ import annotations

import copy
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchvision.models import VisionTransformer

import sfr

RANKS, BATCH = 2, 8


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


def train(kind: str, rank: int, folder: Path) -> dict[str, object]:
    """Train three steps, validating after each, save the model, and load it into a fresh one."""
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
        dcp.save(state, checkpoint_id=folder / kind)
        fresh, _ = build(kind)
        empty = get_model_state_dict(fresh)
        dcp.load(empty, checkpoint_id=folder / kind)
        set_model_state_dict(fresh, empty)
        with torch.no_grad():
            result["loaded"] = F.cross_entropy(fresh.eval()(images[0]), labels)
        result["names"] = list(model.state_dict())  # with the hooks that PyTorch registers on the very model
        result["kind"] = [type(sfr.unwrap(criterion.model)).__name__, isinstance(criterion.model, sfr.SFRWrapper)]
        with torch.no_grad():
            result["unwrapped"] = F.cross_entropy(model(images[0]), labels)
    return result


def work(rank: int, ranks: int, kind: str, folder: Path) -> None:
    warnings.simplefilter("ignore")  # PyTorch's own, of what it shards
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"{kind}.store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.save(train(kind, rank, folder), folder / f"{kind}.{rank}")
    dist.destroy_process_group()


def main(folder: Path, kinds: list[str]) -> None:
    for kind in kinds:
        ranks = 1 if kind == "one process" else RANKS
        try:
            torch.multiprocessing.start_processes(work, (ranks, kind, folder), nprocs=ranks, start_method="fork")
        except Exception:
            (folder / f"{kind}.error").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
