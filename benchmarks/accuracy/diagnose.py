"""What the feature term does inside a network while it trains: one run of sfr, looked into every few epochs.

    python -m benchmarks.accuracy.diagnose --data-dir DIR --schedule tenth-16px --arm sfr --every 10

For one fixed batch of training images it prints and writes, for every pair of stages: EMD-l2, the mean squared error
of the aligned nodes (the identity as the plan), the cost of the independent coupling (no matching at all) and the share
of the mass that the plan leaves in place; for every stage: the root mean square of its nodes (does the loss fall by
shrinking them?) and the norms of the gradients of the label term and of the weighted feature term on its parameters.
An arm with weight=0 shows the same quantities in plain training.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.cell import CELLS, Cell
from benchmarks.accuracy.methods.self_feature import SelfFeature
from benchmarks.accuracy.plans import SCHEDULES
from benchmarks.accuracy.training import CellRun
from benchmarks.common.data import load_parts
from benchmarks.common.environment import environment
from benchmarks.common.paths import CACHE
from sfr.config import Solver
from sfr.feature.nodes import to_nodes
from sfr.transport import emd

BATCH = 256


def main() -> None:
    """Train one cell and look into it."""
    args = parse_arguments()
    cell = Cell(args.arm, args.seed, "held-out", args.schedule, args.model, args.dataset)
    parts = load_parts(cell.dataset, args.data_dir, args.cache, cell.part)
    run = CellRun(cell, SCHEDULES[cell.schedule], parts, torch.device("cpu"))
    if not isinstance(run.arm, SelfFeature):
        raise SystemExit(f"--arm {args.arm}: only sfr has features to look into")
    indices = torch.randperm(len(run.train.labels), generator=torch.Generator().manual_seed(0))[:BATCH]
    findings = []
    for epoch in range(run.schedule.epochs + 1):
        if epoch % args.every == 0:
            findings.append({"epoch": epoch, **looked_into(run, run.arm, indices, args.weight)})
            print(described(findings[-1]), flush=True)
        if epoch < run.schedule.epochs:
            run.train_epoch()
    record = {
        "cell": asdict(cell),
        "schedule": asdict(run.schedule),
        "weight": args.weight,
        "environment": environment(run.device),
        "findings": findings,
        "result": run.judge(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.output}")


def looked_into(run: CellRun, arm: SelfFeature, indices: Tensor, weight: float) -> dict[str, Any]:
    """Return what there is to see of one batch; neither weights nor statistics of the run change."""
    before = {name: value.clone() for name, value in arm.state_dict().items() if isinstance(value, Tensor)}
    arm.train()
    logits = arm.model(run.batches.plain(indices))
    features = arm.model.sfr.take_features(logits)
    label = torch.nn.functional.cross_entropy(logits, run.train.labels[indices])
    pairs = {
        pair.name: plan_facts(*pair.nodes, arm.criterion.config.solver) for pair in arm.criterion.pairs_of(features)
    }
    feature = weight * torch.stack([facts["emd"] for facts in pairs.values()]).mean()
    stages = {
        name: {
            "rms": nodes.detach().square().mean().sqrt().item(),
            "label_gradient": gradient_norm(label, arm.model.sfr.stage(name)),
            "feature_gradient": gradient_norm(feature, arm.model.sfr.stage(name)),
        }
        for name, nodes in stage_nodes(arm, features).items()
    }
    arm.load_state_dict(before, strict=False)
    numbers = {pair: {name: fact.item() for name, fact in facts.items()} for pair, facts in pairs.items()}
    return {"label": label.item(), "feature": feature.item(), "pairs": numbers, "stages": stages}


def stage_nodes(arm: SelfFeature, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the nodes of every stage at the grid of the configuration."""
    grid = arm.criterion.config.max_grid
    maps = arm.criterion.maps.of(features)
    return {name: to_nodes(feature_map, (grid, grid)).float() for name, feature_map in maps.items()}


def plan_facts(shallow: Tensor, deep: Tensor, solver: Solver = "auto") -> dict[str, Tensor]:
    """Return what the matching of nodes (B, N, C) and (B, N, C) brings, against no and against a random one."""
    cost = (shallow[:, :, None] - deep[:, None, :]).square().mean(dim=3)
    distances, plan = emd(cost, solver=solver)
    return {
        "emd": distances.mean(),
        "aligned": cost.diagonal(dim1=1, dim2=2).mean(),
        "independent": cost.mean(),
        "in_place": plan.diagonal(dim1=1, dim2=2).sum(dim=1).mean(),
    }


def gradient_norm(loss: Tensor, stage: torch.nn.Module) -> float:
    """Return the norm of the gradient of `loss` on the parameters of `stage`."""
    gradients = torch.autograd.grad(loss, list(stage.parameters()), retain_graph=True, allow_unused=True)
    return sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None) ** 0.5


def described(finding: dict[str, Any]) -> str:
    lines = [f"epoch {finding['epoch']}: label {finding['label']:.3f}, weighted feature {finding['feature']:.4f}"]
    for name, pair in finding["pairs"].items():
        lines.append(
            f"  {name}: EMD {pair['emd']:.4f}, aligned {pair['aligned']:.4f}, independent {pair['independent']:.4f}, "
            f"{pair['in_place']:.0%} in place"
        )
    for name, stage in finding["stages"].items():
        lines.append(
            f"  {name}: rms {stage['rms']:.3f}, gradient of label {stage['label_gradient']:.3f}, "
            f"of feature {stage['feature_gradient']:.3f}"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with the data set's Parquet files, in place of the Hub")
    add("--schedule", choices=SCHEDULES, default="tenth-16px")
    add("--arm", default="sfr", help='sfr, with options as in "sfr@weight=0.2,grouping=mean"')
    add("--weight", type=float, default=0.2, help="weight of the feature term in the gradients shown")
    add("--every", type=int, default=10, help="epochs between two looks")
    add("--seed", type=int, default=0)
    add("--model", default="resnet20")
    add("--dataset", choices=["cifar100", "cifar10"], default="cifar100")
    add("--cache", type=Path, default=CACHE, help="folder of the decoded images")
    add("--output", type=Path, default=CELLS / "diagnosis.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
