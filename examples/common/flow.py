"""Flow matching on straight paths (Lipman et al., arXiv 2210.02747): noise at time 1, images at time 0."""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # of images, times and labels


def noisy(images: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points on the paths from images to noise, both (B, C, H, W), at times (B,), and their velocities."""
    share = time[:, None, None, None]
    return (1 - share) * images + share * noise, noise - images


def guided(velocity: Velocity, guidance: float, no_class: int) -> Velocity:
    """Return the velocity with what the class adds to it counted `guidance` times (Ho & Salimans, arXiv 2207.12598).

    Args:
        velocity: a network that was also trained without classes.
        guidance: 1 changes nothing; more draws what is typical of a class, and less of its variety.
        no_class: the label that stands for no class.
    """

    def found(images: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        free = velocity(images, time, torch.full_like(labels, no_class))
        return free + guidance * (velocity(images, time, labels) - free)

    return velocity if guidance == 1 else found


@torch.no_grad()
def sample(velocity: Velocity, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Return images (B, C, H, W): noise followed back along the velocity, by Heun's method.

    Args:
        velocity: the trained network.
        noise: where the paths start.
        labels: the classes to draw, (B,).
        steps: equal steps of time, >= 1; each but the last evaluates the network twice.
    """
    images, length = noise, 1 / steps
    for step in range(steps, 0, -1):
        now, then = (images.new_full((len(images),), at / steps) for at in (step, step - 1))
        slope = velocity(images, now, labels)
        if step > 1:  # at time 0 the velocity is that of no noise at all, which is the hardest to know
            slope = (slope + velocity(images - length * slope, then, labels)) / 2
        images = images - length * slope
    return images
