"""KDEP's loss against plain loops, its alignment against ``torch.linalg.svd``, and what must not be possible."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from sfr.pretrain import Alignment, KDEPLoss, PooledFeatures, fit_alignment, power_temperature_scaling
from sfr.pretrain.kdep import Aligner

ALIGNERS = get_args(Aligner)


def teacher_features(count: int = 60, width: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix + torch.randn(width, generator=generator)


class Features(nn.Module):
    """A "teacher" whose features are its images, and whose classifier is a linear layer."""

    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.head = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images)


def fitted(dim: int = 4, features: Tensor | None = None) -> Alignment:
    features = teacher_features() if features is None else features
    return fit_alignment(Features(features.shape[1]), features.split(7), dim)


def svd(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, singular values and right singular vectors of the whole matrix, in the authors' way."""
    mean = features.mean(dim=0)
    _, values, axes = torch.linalg.svd((features - mean).double(), full_matrices=False)
    return mean, values.float(), axes.T.float()


def test_alignment_is_the_svd_of_the_whole_feature_matrix() -> None:
    features = teacher_features()
    mean, values, axes = svd(features)
    alignment = fitted(4)
    torch.testing.assert_close(alignment.mean, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alignment.singular_values, values, rtol=1e-4, atol=1e-4)
    signs = (alignment.basis * axes[:, :4]).sum(dim=0).sign()
    torch.testing.assert_close(alignment.basis, axes[:, :4] * signs, rtol=0, atol=1e-4)
    torch.testing.assert_close(alignment.channel_variance, features.var(dim=0, correction=0), rtol=1e-4, atol=1e-4)


def test_alignment_of_a_network_is_that_of_its_pooled_features_in_evaluation_mode() -> None:
    teacher = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )
    images = torch.randn(20, 3, 5, 5)
    before = teacher[1].running_mean.clone()
    alignment = fit_alignment(teacher, [(part, None) for part in images.split(6)], 2)
    assert teacher.training
    assert teacher[1].training
    assert torch.equal(teacher[1].running_mean, before)
    features = teacher.eval()[:2](images).mean(dim=(2, 3))
    torch.testing.assert_close(alignment.mean, features.mean(dim=0))


def test_alignment_is_saved_and_loaded(tmp_path: Any) -> None:
    alignment = fitted()
    torch.save(alignment.state_dict(), tmp_path / "alignment.pt")
    loaded = Alignment(**torch.load(tmp_path / "alignment.pt", weights_only=True))
    features = teacher_features()
    assert torch.equal(loaded(features), alignment(features))
    assert loaded.dim == 4


def test_projection_by_a_plain_loop() -> None:
    alignment, features = fitted(), teacher_features(3)
    for b in range(3):
        for k in range(4):
            expected = sum((features[b, d] - alignment.mean[d]) * alignment.basis[d, k] for d in range(9))
            torch.testing.assert_close(alignment(features)[b, k], expected)


def reference_loss(student: Tensor, teacher: Tensor, alignment: Alignment, aligner: str, loss: KDEPLoss) -> float:
    """One number at a time."""
    total = 0.0
    variance = alignment.channel_variance.tolist()
    widest = sorted(sorted(range(9), key=lambda d: -variance[d])[:4])
    for b in range(len(student)):
        for k in range(4):
            if aligner == "channel_variance":
                target = teacher[b, widest[k]].item()
            else:
                target = alignment(teacher)[b, k].item()
                if aligner == "svd_pts":
                    target = math.copysign(abs(target / 0.2) ** 0.5, target)
            total += (student[b, k].item() - target) ** 2
    return loss.weight * total / (len(student) * 4)


@pytest.mark.parametrize("aligner", ["svd_pts", "svd", "channel_variance"])
def test_loss_by_a_plain_loop(aligner: Any) -> None:
    alignment, student, teacher = fitted(), torch.randn(5, 4), teacher_features(5)
    loss = KDEPLoss(alignment, aligner, temperature=0.2, power=2, weight=20.0)
    expected = reference_loss(student, teacher, alignment, aligner, loss)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_conv1x1_widens_the_student_by_a_learnable_convolution() -> None:
    loss = KDEPLoss(fitted(), "conv1x1", weight=2.0)
    student, teacher = torch.randn(5, 4, 3, 3), teacher_features(5)
    convolution = nn.Conv2d(4, 9, 1)
    convolution.load_state_dict({"weight": loss.widen.weight[:, :, None, None], "bias": loss.widen.bias})
    expected = 2 * nn.functional.mse_loss(convolution(student).mean(dim=(2, 3)), teacher)
    torch.testing.assert_close(loss(student.mean(dim=(2, 3)), teacher), expected)
    assert len(list(loss.parameters())) == 2


def test_random_channels_are_those_of_the_seed() -> None:
    alignment, teacher = fitted(), teacher_features(5)
    chosen = [KDEPLoss(alignment, "random", seed=seed).channels.tolist() for seed in range(6)]
    assert chosen[0] == KDEPLoss(alignment, "random", seed=0).channels.tolist()
    assert len({tuple(channels) for channels in chosen}) > 1
    assert all(len(set(channels)) == 4 for channels in chosen)
    assert torch.equal(KDEPLoss(alignment, "random", seed=1).target(teacher), teacher[:, chosen[1]])


@pytest.mark.parametrize("aligner", [aligner for aligner in ALIGNERS if aligner != "conv1x1"])
def test_nothing_is_trained_beside_the_student(aligner: Any) -> None:
    assert list(KDEPLoss(fitted(), aligner).parameters()) == []


def test_default_is_the_method_with_the_authors_temperature_and_power() -> None:
    alignment, student, teacher = fitted(), torch.randn(5, 4), teacher_features(5)
    scaled = alignment(teacher).sign() * (alignment(teacher).abs() / 0.1) ** (1 / 3)
    torch.testing.assert_close(KDEPLoss(alignment)(student, teacher), 3 * nn.functional.mse_loss(student, scaled))


@pytest.mark.parametrize("weight", [3.0, 20.0])
def test_weight_is_the_authors_on_the_mean_over_batch_and_channels(weight: float) -> None:
    alignment, student, teacher = fitted(), torch.randn(5, 4), teacher_features(5)
    loss = KDEPLoss(alignment, "svd", weight=weight)
    total = (student - alignment(teacher)).square().sum()
    torch.testing.assert_close(loss(student, teacher), weight * total / (5 * 4))


@pytest.mark.parametrize("aligner", ALIGNERS)
def test_gradient_by_finite_differences(aligner: Any) -> None:
    loss = KDEPLoss(fitted(), aligner).double()
    student, teacher = torch.randn(3, 4, dtype=torch.float64), teacher_features(3).double()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student.requires_grad_(),))


@pytest.mark.parametrize("aligner", ALIGNERS)
def test_teacher_gets_no_gradient(aligner: Any) -> None:
    student, teacher = torch.randn(3, 4, requires_grad=True), teacher_features(3).requires_grad_()
    KDEPLoss(fitted(), aligner)(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_scaling_brings_unequal_spreads_nearer_together() -> None:
    spreads = torch.randn(2000, 3) * torch.tensor([0.01, 1.0, 100.0])
    scaled = power_temperature_scaling(spreads).std(dim=0)
    assert spreads.std(dim=0)[2] / spreads.std(dim=0)[0] > 5000
    assert scaled[2] / scaled[0] < 30
    assert torch.equal(power_temperature_scaling(spreads).sign(), spreads.sign())


def test_student_wider_than_the_teacher_is_refused_with_both_widths() -> None:
    with pytest.raises(ValueError, match=r"dim must be at most 9.*got 10"):
        fitted(10)


@pytest.mark.parametrize("dim", [0, -1])
def test_dim_below_one_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"dim must .*got {dim}"):
        fitted(dim)


def test_empty_loader_is_refused() -> None:
    with pytest.raises(ValueError, match="loader must give at least one image"):
        fit_alignment(Features(), [], 2)


@pytest.mark.parametrize("batch", [{"image": torch.zeros(1)}, [], "images"])
def test_batch_that_is_no_image_tensor_is_refused(batch: Any) -> None:
    with pytest.raises(TypeError, match="loader must give image tensors"):
        fit_alignment(Features(), [batch], 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    features = teacher_features()
    features[3, 2] = bad
    with pytest.raises(ValueError, match="not all finite"):
        fitted(4, features)


@pytest.mark.parametrize("aligner", ALIGNERS)
@pytest.mark.parametrize(
    "features",
    [teacher_features(1), torch.full((12, 9), 2.5), torch.zeros(12, 9), teacher_features()[:, :1].expand(-1, 9)],
    ids=["one image", "constant", "zero", "rank one"],
)
def test_loss_is_finite_without_variance(features: Tensor, aligner: Any) -> None:
    student = torch.randn(1, 4, requires_grad=True)
    loss = KDEPLoss(fitted(4, features), aligner)(student, features[:1])
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("aligner", ["svd_pts", "conv1x1"])
def test_loss_is_float32_inside_autocast(aligner: Any) -> None:
    alignment, student, teacher = fitted(), torch.randn(5, 4), teacher_features(5)
    loss = KDEPLoss(alignment, aligner)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(student.bfloat16(), teacher)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, loss(student.bfloat16().float(), teacher), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((5, 3), (5, 9)), ((5, 4), (5, 8)), ((5, 4), (4, 9)), ((0, 4), (0, 9)), ((5, 4, 1), (5, 9))],
)
def test_features_that_do_not_fit_are_refused_with_both_shapes(student: Any, teacher: Any) -> None:
    with pytest.raises(ValueError, match=r"\(B, 4\) and \(B, 9\)"):
        KDEPLoss(fitted())(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize(
    "options", [{"aligner": "pca"}, {"temperature": 0}, {"power": 0.5}, {"weight": 0}, {"weight": float("nan")}]
)
def test_argument_out_of_range_is_refused_by_name(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must .*got {value!r}"):
        KDEPLoss(fitted(), **options)


def test_student_follows_the_teacher() -> None:
    """Pre-training end to end: a linear student reaches the targets of svd_pts as far as it is able to."""
    teacher, student = PooledFeatures(Features()), nn.Linear(9, 4)
    images = teacher_features(200)
    loss = KDEPLoss(fit_alignment(teacher, images.split(50), 4))
    optimizer = torch.optim.Adam([*student.parameters()], 0.05)
    history = []
    for _ in range(100):
        value = loss(student(images), images)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(value.item())
    assert history[-1] < 0.25 * history[0]
