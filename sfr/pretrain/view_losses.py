"""Losses of the embeddings of two views of each image: two self-supervised ones, and one towards a peer network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sfr.checks import check_number

Embeddings: TypeAlias = Sequence[Tensor]


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    r"""Return SimCLR's loss: each view has to find the other view of its image among all other views of the batch.

    .. math::
        L = -\frac1{2B} \sum_{i=1}^{2B} \log
            \frac{\exp(\cos(z_i, z_{j(i)}) / \tau)}{\sum_{k \ne i} \exp(\cos(z_i, z_k) / \tau)}

    Args:
        a, b: embeddings of the two views, shape (B, D), B >= 2.
        temperature: τ > 0.

    Returns:
        A 0-d tensor; log(2B - 1) where all embeddings are alike.

    Raises:
        ValueError: for shapes that do not fit, or a batch of one image, which has no others to compare with.

    Reference:
        Chen et al., A Simple Framework for Contrastive Learning, ICML 2020.

    Example:
        >>> embeddings = torch.eye(2)  # the views of an image agree, those of the two images are orthogonal
        >>> round(float(nt_xent(embeddings, embeddings, temperature=1.0)), 4)  # log(e + 2) - 1
        0.5514
    """
    check_number("temperature", temperature, 1e-6)
    a, b = checked_embeddings({"a": a, "b": b})
    images = len(a)
    if images < 2:
        raise ValueError("NT-Xent compares each image with others: the batch must hold at least 2 images; got 1")
    views = torch.cat([_unit(a), _unit(b)])
    with torch.autocast(views.device.type, enabled=False):
        similarities = views @ views.T / temperature
        itself = torch.eye(2 * images, dtype=torch.bool, device=views.device)
        other_view = torch.arange(2 * images, device=views.device).roll(images)
        return F.cross_entropy(similarities.masked_fill(itself, -torch.inf), other_view)


def simsiam(a: Tensor, b: Tensor, predicted_a: Tensor, predicted_b: Tensor) -> Tensor:
    r"""Return SimSiam's loss: from each view the projection of the other one, held constant, is predicted.

    .. math:: L = -\frac{1}{2B} \sum_i \cos(p^a_i, \mathrm{sg}\, z^b_i) + \cos(p^b_i, \mathrm{sg}\, z^a_i)

    Args:
        a, b: projections of the two views, shape (B, D); they receive no gradient.
        predicted_a, predicted_b: the predictor's outputs for them, shape (B, D).

    Returns:
        A 0-d tensor in [-1, 1].

    Raises:
        ValueError: for shapes that do not fit.

    Reference:
        Chen & He, Exploring Simple Siamese Representation Learning, CVPR 2021.

    Example:
        >>> projections = torch.eye(3)
        >>> float(simsiam(projections, projections, projections, projections))
        -1.0
    """
    tensors = {"a": a, "b": b, "predicted_a": predicted_a, "predicted_b": predicted_b}
    a, b, predicted_a, predicted_b = map(_unit, checked_embeddings(tensors))
    agreement = (predicted_a * b.detach()).sum(dim=1) + (predicted_b * a.detach()).sum(dim=1)
    return -agreement.mean() / 2


def similarity_kl(own: Embeddings, peer: Embeddings, temperature: float = 0.1) -> Tensor:
    r"""Return how far a network's similarity distribution is from its peer's, which is held constant.

    .. math::
        L = \frac1B \sum_{ij} Q_{ij} \log \frac{Q_{ij}}{P_{ij}}, \qquad
        P_{i\cdot} = \mathrm{softmax}_j \frac{\cos(a_i, b_j)}{\tau}, \qquad Q \text{ likewise, of the peer}

    The rows are the first views, the columns the second ones, positives included; the widths of the two networks may
    differ, because only similarities are compared.

    Args:
        own: the network's embeddings (a, b) of its two views, each of shape (B, D).
        peer: its peer's embeddings of the same images, each of shape (B, E); they receive no gradient.
        temperature: τ > 0.

    Returns:
        A 0-d tensor, KL(Q || P) >= 0 as a mean over the rows.

    Raises:
        ValueError: for shapes that do not fit.

    Reference:
        Bhat, Arani & Zonooz, Distill on the Go, CVPR workshops 2021, arXiv 2104.09866; temperature from their code.

    Example:
        >>> views = torch.randn(4, 8), torch.randn(4, 8)
        >>> float(similarity_kl(views, views))
        0.0
    """
    check_number("temperature", temperature, 1e-6)
    own_a, own_b = checked_embeddings(_named("own", own))
    peer_a, peer_b = checked_embeddings(_named("peer", peer))
    if len(own_a) != len(peer_a):
        raise ValueError(f"own and peer must hold the same images; got {len(own_a)} and {len(peer_a)} of them")
    target = _log_similarities(peer_a, peer_b, temperature).detach()
    return F.kl_div(_log_similarities(own_a, own_b, temperature), target, reduction="batchmean", log_target=True)


def _named(argument: str, views: Embeddings) -> dict[str, Tensor]:
    if len(views) != 2:
        raise ValueError(f"{argument} must be the embeddings of two views; got {len(views)}")
    return {f"{argument}[0]": views[0], f"{argument}[1]": views[1]}


def checked_embeddings(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Return the embeddings in at least float32, or raise an error that names the one that does not fit."""
    shape: torch.Size | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating tensor; got {got}")
        shape = tensor.shape if shape is None else shape
        if tensor.ndim != 2 or 0 in tensor.shape or tensor.shape != shape:
            raise ValueError(
                f"the embeddings of one network must have one shape (B, D), B and D at least 1; "
                f"got {', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in tensors.items())}"
            )
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors.values()]


def _unit(vectors: Tensor) -> Tensor:
    """Scale vectors to length 1. A zero vector stays zero, with a bounded gradient, unlike in ``F.normalize``."""
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / length.where(length > 0, 1.0)


def _log_similarities(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Row-wise log-softmax of the cosines, (B, B)."""
    with torch.autocast(a.device.type, enabled=False):
        return F.log_softmax(_unit(a) @ _unit(b).T / temperature, dim=1)
