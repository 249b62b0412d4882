"""KDEP: pre-train a student on unlabelled images from the features of a frozen teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfr.checks import check_choice, check_number
from sfr.pretrain.moments import Moments
from sfr.pretrain.pooled import PooledFeatures

Aligner: TypeAlias = Literal["svd_pts", "svd", "channel_variance", "random", "conv1x1"]


class Alignment(nn.Module):
    r"""Mean, principal axes and variances of a teacher's features, D channels wide.

    Its state dict holds its own arguments: ``torch.save(alignment.state_dict(), file)`` saves it and
    ``Alignment(**torch.load(file, weights_only=True))`` loads it.

    Args:
        mean: :math:`\mu`, shape (D,).
        basis: the first columns of V, shape (D, dim): directions of largest variance, orthonormal.
        singular_values: of the matrix of all centred features, largest first, shape (D,).
        channel_variance: of each channel of the teacher, shape (D,).

    Example:
        >>> alignment = Alignment(torch.zeros(3), torch.eye(3)[:, :2], torch.tensor([3.0, 2.0, 1.0]), torch.ones(3))
        >>> alignment(torch.tensor([[5.0, 6.0, 7.0]]))
        tensor([[5., 6.]])
    """

    mean: Tensor
    basis: Tensor
    singular_values: Tensor
    channel_variance: Tensor

    def __init__(self, mean: Tensor, basis: Tensor, singular_values: Tensor, channel_variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        self.register_buffer("singular_values", singular_values)
        self.register_buffer("channel_variance", channel_variance)

    @property
    def dim(self) -> int:
        """Width of the student's features."""
        return self.basis.shape[1]

    def forward(self, teacher: Tensor) -> Tensor:
        r"""Return :math:`(t - \mu) V`, shape (B, dim), of teacher features of shape (B, D)."""
        return (teacher - self.mean) @ self.basis


@torch.no_grad()
def fit_alignment(teacher: nn.Module, loader: Iterable[Any], dim: int) -> Alignment:
    """Return mean and principal axes of a teacher's features over all images of a loader.

    One pass with D² memory in float64, exact to the SVD of the whole feature matrix. With ``torch.distributed``
    initialised every rank goes through its own share of the images, and all get the same result. The teacher runs in
    evaluation mode, on the device of its parameters.

    Args:
        teacher: a classifier, or a :class:`PooledFeatures` around one, which may name the layer to read.
        loader: batches of images, each a tensor or a tuple whose first element is one; labels are not used.
        dim: width of the student's features, at most the teacher's D.

    Raises:
        ValueError: if `dim` is not in [1, D], the loader is empty, or a feature is not finite.
        TypeError: for batches of another kind.

    Reference:
        He et al., CVPR 2022, arXiv 2203.05180; their code takes the SVD of the features of all training images.

    Example:
        >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> fit_alignment(teacher, [torch.randn(5, 3, 2, 2) for _ in range(3)], dim=2).basis.shape
        torch.Size([8, 2])
    """
    features = teacher if isinstance(teacher, PooledFeatures) else PooledFeatures(teacher)
    device = next((parameter.device for parameter in teacher.parameters()), torch.device("cpu"))
    training = [module for module in features.modules() if module.training]
    features.eval()
    try:
        return alignment_of((features(_images_of(batch).to(device)) for batch in loader), dim)
    finally:
        for module in training:
            module.training = True


def alignment_of(features: Iterable[Tensor], dim: int) -> Alignment:
    """Return the alignment to a student of width `dim` from batches (B, D) of a teacher's features, those of all ranks.

    Raises:
        ValueError: if `dim` is not in [1, D], there are no features, or one is not finite.
    """
    own = Moments()
    for batch in features:
        own.update(batch)
    moments = own.of_all_ranks()
    if not moments.count:
        raise ValueError("loader must give at least one image; it was empty")
    if not moments.scatter.isfinite().all():
        raise ValueError("the teacher's features are not all finite: look at the teacher's weights and the images")
    width = len(moments.mean)
    check_number("dim", dim, 1, whole=True)
    if dim > width:
        raise ValueError(
            f"dim must be at most {width}, the width of the teacher's features; got {dim}. A student wider than its "
            "teacher has no SVD alignment: take a wider teacher or a narrower student"
        )
    singular_values, axes = moments.principal_axes()
    variance = moments.scatter.diagonal() / moments.count
    return Alignment(
        moments.mean.float(), axes[:, :dim].contiguous().float(), singular_values.float(), variance.float()
    )


def _images_of(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise TypeError(f"loader must give image tensors, or tuples that begin with one; got {type(images).__name__}")
    return images


def power_temperature_scaling(features: Tensor, temperature: float = 0.1, power: float = 3.0) -> Tensor:
    r"""Return :math:`\operatorname{sign}(u)\,|u/T|^{1/n}`, which brings channels of unequal spread nearer together.

    Args:
        features: u, any shape.
        temperature: T > 0. The authors use 0.1; they also tried 0.03 (with n = 3) and 0.2 (with n = 2).
        power: n >= 1.

    Raises:
        TypeError, ValueError: for a temperature or power out of range.

    Example:
        >>> power_temperature_scaling(torch.tensor([-0.8, 0.0, 2.7]))
        tensor([-2.,  0.,  3.])
    """
    _check_scaling(temperature, power)
    return features.sign() * (features / temperature).abs().pow(1 / power)


def _check_scaling(temperature: float, power: float) -> None:
    check_number("temperature", temperature, 1e-6)
    check_number("power", power, 1)


class KDEPLoss(nn.Module):
    r"""Mean squared distance of the student's features to the teacher's, brought to the student's width.

    .. math:: L = w \cdot \operatorname{mean}\big((s - g(u))^2\big), \qquad u = (t - \mu) V_{:, :D_s}

    with g the power temperature scaling. The mean is over batch and channels, as in ``F.mse_loss``, so the
    authors' weights apply unchanged. The teacher gets no gradient, and only the student is trained (with "conv1x1" the
    convolution as well).

    Args:
        alignment: of :func:`fit_alignment`; its ``dim`` is the width of the student's features.
        aligner: how the teacher's D channels become the student's ``dim``:

            - "svd_pts": projection on the principal axes, then power temperature scaling (the method);
            - "svd": the projection alone;
            - "channel_variance": the channels of largest variance, unchanged;
            - "random": channels drawn once, by `seed`;
            - "conv1x1": none; a learnable 1x1 convolution (on pooled features: a linear layer) widens the student's
              features instead. Its parameters are this module's: give them to the optimizer.
        temperature, power: see :func:`power_temperature_scaling`; for "svd_pts" only.
        weight: w > 0. The authors' is 20 for a plainly trained ResNet-50, 3 for another teacher.
        seed: seed of the draw of "random".

    Raises:
        TypeError, ValueError: for an argument out of range, or features that do not fit the alignment.

    Reference:
        He et al., Knowledge Distillation as Efficient Pre-training, CVPR 2022, arXiv 2203.05180.

    Example:
        >>> alignment = Alignment(torch.zeros(3), torch.eye(3)[:, :2], torch.ones(3), torch.ones(3))
        >>> loss = KDEPLoss(alignment, weight=2.0)
        >>> float(loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.8, 0.1, 9.0]])))
        1.0
    """

    channels: Tensor

    def __init__(
        self,
        alignment: Alignment,
        aligner: Aligner = "svd_pts",
        *,
        temperature: float = 0.1,
        power: float = 3.0,
        weight: float = 3.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("aligner", aligner, Aligner)
        _check_scaling(temperature, power)
        check_number("weight", weight, 1e-12)
        self.alignment, self.aligner = alignment, aligner
        self.temperature, self.power, self.weight = temperature, power, weight
        width, dim = len(alignment.mean), alignment.dim
        if aligner == "channel_variance":
            self.register_buffer("channels", alignment.channel_variance.topk(dim).indices.sort().values)
        elif aligner == "random":
            generator = torch.Generator().manual_seed(seed)
            self.register_buffer("channels", torch.randperm(width, generator=generator)[:dim].sort().values)
        elif aligner == "conv1x1":
            self.widen = nn.Linear(dim, width)

    @torch.no_grad()
    def target(self, teacher: Tensor) -> Tensor:
        """Return the target of the student's features: teacher features (B, D) brought to width ``dim``.

        With "conv1x1" the student is brought to the teacher's width instead, and the target is (B, D).
        """
        if self.aligner == "conv1x1":
            return teacher.detach()
        if self.aligner in ("channel_variance", "random"):
            return teacher[:, self.channels]
        projected = self.alignment(teacher)
        if self.aligner == "svd":
            return projected
        return power_temperature_scaling(projected, self.temperature, self.power)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of student features (B, dim) against teacher features (B, D), as a 0-d tensor."""
        expected = (len(student), self.alignment.dim), (len(student), len(self.alignment.mean))
        if not len(student) or (student.shape, teacher.shape) != expected:
            raise ValueError(
                f"student and teacher must be (B, {expected[0][1]}) and (B, {expected[1][1]}), the widths of the "
                f"alignment, with B >= 1; got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        with torch.autocast(student.device.type, enabled=False):
            dtype = torch.promote_types(student.dtype, self.alignment.mean.dtype)
            student, target = student.to(dtype), self.target(teacher.to(dtype))
            if self.aligner == "conv1x1":
                student = self.widen(student)
            return self.weight * F.mse_loss(student, target)

    def extra_repr(self) -> str:
        return f"aligner={self.aligner}, weight={self.weight}"
