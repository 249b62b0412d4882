"""Be your own teacher (Zhang et al., BYOT, ICCV 2019, arXiv 1905.08094)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfr
from benchmarks.accuracy.methods.arm import Arm, Task, divergence
from sfr.model.choose import choose
from sfr.model.settings import StageSettings
from sfr.model.watch import watch


class BeYourOwnTeacher(Arm):
    """Cross-entropy + for each stage but the last, of a classifier on it that is trained too and then thrown away,

        (1 - alpha) * cross-entropy + alpha * KL(network || classifier) + beta * distance of the features

    Predictions are softened by the temperature in the divergence, which is not multiplied by its square; the features
    are those before the linear layer, their distance the mean of squares; the network's own side gets no gradient from
    either. Alpha and temperature are the defaults of the authors' code, that of their later journal version. Its weight
    of the features belongs to another distance; beta is that of Self-KD-Lib, a public comparison on CIFAR-100.
    """

    model: sfr.SFRWrapper

    def __init__(self, task: Task, alpha: float = 0.3, beta: float = 0.05, temperature: float = 3.0) -> None:
        super().__init__(task)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        shapes = stage_shapes(task.model, task.labels.device)
        self.model = sfr.SFRWrapper(task.model, stages=list(shapes))
        *shallow, (width, *_, last_size) = shapes.values()
        with torch.random.fork_rng(devices=[]):  # other arms do not draw these weights
            self.heads = nn.ModuleList(
                Head(channels, width, size // last_size, task.num_classes) for channels, _, size in shallow
            )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        *shallow, deepest = self.model.sfr.take_features(logits).values()
        taught = deepest.detach().float().mean(dim=(2, 3))
        total = F.cross_entropy(logits, labels)
        for head, feature_map in zip(self.heads, shallow, strict=True):
            feature, prediction = head(feature_map)
            total = total + (1 - self.alpha) * F.cross_entropy(prediction, labels)
            total = total + self.alpha * divergence(prediction, logits, self.temperature)
            total = total + self.beta * F.mse_loss(feature.float(), taught)
        return total


class Head(nn.Module):
    """Bottleneck and classifier on a shallow map (B, C, H, W): features (B, D) and logits (B, K).

    Args:
        channels: C.
        width: D, the channels of the last stage; the bottleneck has a quarter of them.
        factor: how many times smaller, along an axis, the map of the last stage is.
        num_classes: K.
    """

    def __init__(self, channels: int, width: int, factor: int, num_classes: int) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(
            *convolution(channels, width // 4, 1),
            *convolution(width // 4, width // 4, factor),
            *convolution(width // 4, width, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.bottleneck(feature_map)
        return feature, self.classifier(feature)


def convolution(channels: int, width: int, size: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, size, stride=size, bias=False), nn.BatchNorm2d(width), nn.ReLU()


@torch.no_grad()
def stage_shapes(model: nn.Module, device: torch.device) -> dict[str, torch.Size]:
    """Return the shape (C, H, W) of the output of each stage for an image of 32 pixels, by name, in forward order."""
    training = model.training
    _, trace = watch(model.eval(), (torch.zeros(1, 3, 32, 32, device=device),), {}, StageSettings())
    model.train(training)
    return {name: torch.Size(stage.shape[1:]) for name, stage in choose(trace).items()}
