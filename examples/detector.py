"""A detector, which computes its own losses: name the stages and pass the losses through. A few steps on random images.

python examples/detector.py --steps 3 --size 96
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

import sfr

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--size", type=int, default=96, help="of the images, in pixels")
args = parser.parse_args()


def own_losses(losses: dict[str, Tensor], _: None) -> Tensor:
    """Return the sum of what the detector computes from the targets that it is given."""
    return torch.stack(list(losses.values())).sum()


torch.manual_seed(0)
detector: Any = fasterrcnn_mobilenet_v3_large_320_fpn(
    weights=None, weights_backbone=None, num_classes=5, min_size=args.size, max_size=args.size
)
model = sfr.SFRWrapper(detector, stages=["backbone.body.6", "backbone.body.12", "backbone.body.16"])
criterion = sfr.SFRLoss(model, label_loss=own_losses)
optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)

for step in range(1, args.steps + 1):
    images = [torch.rand(3, args.size, args.size) for _ in range(2)]
    box = torch.tensor([[8.0, 8.0, args.size / 2, args.size / 2]])
    targets = [{"boxes": box, "labels": torch.randint(1, 5, (1,))} for _ in images]
    loss = criterion(model(images, targets), None)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    parts = criterion.last
    print(f"step {step}: its own losses {parts.label:.3f}, feature term {parts.feature:.3f} times {parts.weight}")

model.unwrap()  # the plain detector again
