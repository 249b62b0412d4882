"""DoGo: two networks train side by side without labels, and each also learns which images its peer finds alike."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfr.checks import check_choice, check_number
from sfr.pretrain.gather import GatherRows
from sfr.pretrain.view_losses import Embeddings, checked_embeddings, nt_xent, similarity_kl, simsiam

Objective: TypeAlias = Literal["simclr", "simsiam"]

FIELDS: dict[str, tuple[str, ...]] = {
    "simclr": ("projection a", "projection b"),
    "simsiam": ("projection a", "projection b", "prediction a", "prediction b"),
}
AUTHORS_WEIGHT = 100 / 256  # their 100 at their batch of 256, see DoGoLoss


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
        return checked_embeddings(named)

    def _gathered(self, networks: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Return the embeddings of the global batch, in one communication."""
        sizes = {name: len(given[0]) for name, given in networks.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"both networks must be given the same images; got {sizes} of them")
        if not (self.sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return networks
        flat = [tensor for given in networks.values() for tensor in given]
        columns = iter(GatherRows.apply(torch.cat(flat, dim=1)).split([tensor.shape[1] for tensor in flat], dim=1))
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
