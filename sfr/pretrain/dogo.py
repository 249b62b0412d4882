"""DoGo: two networks train side by side without labels, and each also learns which images its peer finds alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sfr.checks import check_choice, check_number

Objective: TypeAlias = Literal["simclr", "simsiam"]
Embeddings: TypeAlias = Sequence[Tensor]

FIELDS: dict[str, tuple[str, ...]] = {
    "simclr": ("projection a", "projection b"),
    "simsiam": ("projection a", "projection b", "prediction a", "prediction b"),
}
AUTHORS_WEIGHT = 100 / 256  # their 100 at their batch of 256, see DoGoLoss


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
    a, b = _checked({"a": a, "b": b})
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
    a, b, predicted_a, predicted_b = map(_unit, _checked(tensors))
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
    own_a, own_b = _checked(_named("own", own))
    peer_a, peer_b = _checked(_named("peer", peer))
    if len(own_a) != len(peer_a):
        raise ValueError(f"own and peer must hold the same images; got {len(own_a)} and {len(peer_a)} of them")
    target = _log_similarities(peer_a, peer_b, temperature).detach()
    return F.kl_div(_log_similarities(own_a, own_b, temperature), target, reduction="batchmean", log_target=True)


class DoGoLoss(nn.Module):
    r"""Online mutual distillation of two self-supervised networks, which may differ in kind and size.

    .. math::
        L_1 = L_{ssl}(1) + w_1\, KL(\mathrm{sg}\, P_2 \,\|\, P_1), \qquad
        L_2 = L_{ssl}(2) + w_2\, KL(\mathrm{sg}\, P_1 \,\|\, P_2)

    with :func:`nt_xent` or :func:`simsiam` as the self-supervised term and :func:`similarity_kl` as the mutual one.
    With "simsiam" a network's predictions are held against its peer's projections. Each loss has gradients for its
    own network only, so one backward of their sum trains both.

    The mutual term is a mean over the B rows. The authors' code averages over all B² entries: their weight w is
    ``w / B`` here. The default of 0.39 is their 100 at a batch of 256.

    Under ``torch.distributed`` the embeddings of all ranks are gathered, so that each rank computes the loss of the
    global batch; with DDP (or whatever else averages gradients over the ranks) the gradients are exactly those of one
    process with that batch. All ranks must bring equally many images; encoders with BatchNorm need ``SyncBatchNorm``
    for exactness.

    Everything is computed in float32 (float64 stays), also inside autocast. An embedding of zeros is at similarity 0
    to all others; embeddings that are all alike give a finite loss.

    Args:
        objective: "simclr" or "simsiam".
        temperature: τ of NT-Xent; not used by "simsiam".
        similarity_temperature: τ of the similarity distributions.
        weights: w_1 and w_2, >= 0.
        sync: gather over the ranks of ``torch.distributed``.

    Attributes:
        last: the parts of the last loss by name, detached, for logging.

    Reference:
        Bhat, Arani & Zonooz, Distill on the Go, CVPR workshops 2021, arXiv 2104.09866.

    Example:
        >>> from sfr.pretrain import TwoViewNetwork
        >>> from torchvision.models import resnet18, resnet34
        >>> small, large = TwoViewNetwork(resnet18()), TwoViewNetwork(resnet34())
        >>> loss = DoGoLoss(objective="simclr")
        >>> views = [torch.randn(4, 3, 32, 32) for _ in range(4)]  # each network gets two views of its own
        >>> loss_of_small, loss_of_large = loss(small(*views[:2]), large(*views[2:]))
        >>> (loss_of_small + loss_of_large).backward()
    """

    def __init__(
        self,
        objective: Objective = "simclr",
        temperature: float = 0.5,
        similarity_temperature: float = 0.1,
        weights: tuple[float, float] = (AUTHORS_WEIGHT, AUTHORS_WEIGHT),
        sync: bool = True,
    ) -> None:
        super().__init__()
        check_choice("objective", objective, Objective)
        check_number("temperature", temperature, 1e-6)
        check_number("similarity_temperature", similarity_temperature, 1e-6)
        if not isinstance(weights, (tuple, list)) or len(weights) != 2:
            raise ValueError(f"weights must be two numbers, one per network; got {weights!r}")
        for weight in weights:
            check_number("weights", weight, 0)
        self.objective, self.sync = objective, sync
        self.temperature, self.similarity_temperature = temperature, similarity_temperature
        self.weights = tuple(weights)
        self.last: dict[str, Tensor] = {}

    def forward(self, first: Embeddings, second: Embeddings | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss of each of the two networks, or of `first` trained alone.

        Args:
            first: embeddings of the first network for its two views of the batch, each of shape (B, D):
                ``(projection a, projection b)`` for "simclr", ``(projection a, projection b, prediction a,
                prediction b)`` for "simsiam". :class:`sfr.pretrain.TwoViewNetwork` returns just that.
            second: embeddings of the second network for the same images, (B, E); None trains `first` alone.

        Returns:
            Two 0-d tensors, or, without `second`, the self-supervised loss of `first` as one.

        Raises:
            TypeError, ValueError: naming the embedding that is missing or does not fit.
        """
        networks = {"first": first} if second is None else {"first": first, "second": second}
        embeddings = self._gathered({name: self._checked(name, given) for name, given in networks.items()})
        own = {name: self._self_supervised(given) for name, given in embeddings.items()}
        self.last = {f"ssl_{name}": loss.detach() for name, loss in own.items()}
        if second is None:
            return own["first"]
        mutual = {
            "first": self._mutual(embeddings["first"], embeddings["second"]),
            "second": self._mutual(embeddings["second"], embeddings["first"]),
        }
        self.last |= {f"kl_{name}": loss.detach() for name, loss in mutual.items()}
        return own["first"] + self.weights[0] * mutual["first"], own["second"] + self.weights[1] * mutual["second"]

    def _checked(self, network: str, given: Embeddings) -> list[Tensor]:
        fields = FIELDS[self.objective]
        if not isinstance(given, (tuple, list)) or len(given) != len(fields):
            got = f"{len(given)} of them" if isinstance(given, (tuple, list)) else type(given).__name__
            raise ValueError(
                f"{network} must be a tuple ({', '.join(fields)}) for objective={self.objective!r}; got {got}"
            )
        named = {f"{network}, {field}": tensor for field, tensor in zip(fields, given, strict=True)}
        return _checked(named)

    def _gathered(self, networks: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Return the embeddings of the global batch, in one communication."""
        sizes = {name: len(given[0]) for name, given in networks.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"both networks must be given the same images; got {sizes} of them")
        if not (self.sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return networks
        flat = [tensor for given in networks.values() for tensor in given]
        columns = iter(_GatherRows.apply(torch.cat(flat, dim=1)).split([tensor.shape[1] for tensor in flat], dim=1))
        return {name: [next(columns) for _ in given] for name, given in networks.items()}

    def _self_supervised(self, embeddings: list[Tensor]) -> Tensor:
        if self.objective == "simclr":
            a, b = embeddings
            return nt_xent(a, b, self.temperature)
        return simsiam(*embeddings)

    def _mutual(self, own: list[Tensor], peer: list[Tensor]) -> Tensor:
        """Compare the network's last two embeddings, the predictions if it has any, with its peer's projections."""
        return similarity_kl(own[-2:], peer[:2], self.similarity_temperature)

    def extra_repr(self) -> str:
        return (
            f"objective={self.objective}, temperature={self.temperature}, "
            f"similarity_temperature={self.similarity_temperature}, weights={self.weights}"
        )


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks, one rank's below the other's.

    Every rank goes on to compute the same loss of all rows, so each knows the gradient of its own ones without asking
    the others. It is multiplied by the number of ranks because DDP will divide the sum over the ranks by that number.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        ranks = dist.get_world_size()
        return ranks * gradient.chunk(ranks)[dist.get_rank()]


def _named(argument: str, views: Embeddings) -> dict[str, Tensor]:
    if len(views) != 2:
        raise ValueError(f"{argument} must be the embeddings of two views; got {len(views)}")
    return {f"{argument}[0]": views[0], f"{argument}[1]": views[1]}


def _checked(tensors: dict[str, Tensor]) -> list[Tensor]:
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
