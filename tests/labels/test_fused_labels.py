"""The kernels of the label term: under Triton's interpreter they give what PyTorch's operations give."""

import ast
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import sfr
from sfr.labels import DynamicLabelSmoothing, smoothing
from sfr.labels import on_a_device as way
from sfr.labels.fitted import fitted
from sfr.transport.fallback import OptionalSolver

pytest.importorskip("triton")
from devices import OnItsDevice, StepWithoutMemory, pass_for_a_device
from gpu_not_there import run_for_a_gpu

from sfr.labels import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU Triton's interpreter runs the kernels
CLASSES, SAMPLES, ROWS = 18, 10, 5
OF_SOURCE: dict[str, dict[str, Any]] = {
    "uniform": {"mode": "uniform", "alpha": 0.3},
    "class means": {"mode": "class_mean", "momentum": 0.3},
    "class means, the last only": {"mode": "class_mean", "momentum": 1.0},
    "class means of an epoch": {"mode": "class_mean", "update": "epoch"},
    "past": {"mode": "past", "num_samples": SAMPLES, "alpha": sfr.Ramp(0.1, 0.9, 3)},
    "mean of the past": {"mode": "past", "num_samples": SAMPLES, "momentum": 0.3},
    "early learning": {"mode": "past", "num_samples": SAMPLES, "alpha": sfr.Ramp(0.1, 0.9, 3), "early_learning": 3},
    "early learning alone": {"mode": "past", "num_samples": SAMPLES, "alpha": 0.0, "early_learning": 7.0},
}
# NumPy, by which the interpreter computes, warns of each NaN.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
KERNELS = ("loss_kernel", "keep_kernel", "early_kernel", "class_sums_kernel", "move_kernel", "fitted_kernel")
KINDS = ("uniform", "class means", "mean of the past", "early learning")
of_each_source = pytest.mark.parametrize("options", OF_SOURCE.values(), ids=OF_SOURCE)
of_each_kind = pytest.mark.parametrize("options", [OF_SOURCE[kind] for kind in KINDS], ids=KINDS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program take the classes in two goes, and the solver be tried again after a test that broke it."""
    monkeypatch.setattr(fused, "LONGEST_BLOCK", 16)
    monkeypatch.setattr(way, "label_kernels", OptionalSolver("triton", way._load, way.label_kernels.failure))


def on_a_device(patch: pytest.MonkeyPatch, *, kernels: bool = True) -> None:
    """Let logits in the CPU's memory pass for those of a CUDA device, whose values the host does not look at."""
    pass_for_a_device(patch)
    patch.setattr(smoothing, "may_hold_impossible", lambda _: True)
    patch.setattr(way.label_kernels, "given_up", not kernels)


def step(number: int, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of which most are correct, labels of which one is ignored, and numbers of which one comes twice."""
    draws = torch.Generator().manual_seed(number)
    numbers = torch.randperm(SAMPLES, generator=draws)[:rows]
    target = numbers % 5
    logits = torch.randn(rows, CLASSES, generator=draws) + 3 * F.one_hot(target, CLASSES)
    numbers[-1], target[2 % rows] = numbers[0], -100
    return logits.to(DEVICE, dtype), target.to(DEVICE), numbers.to(DEVICE)


class Compared:
    """Two criteria of the same settings: one has the kernels and the other PyTorch's operations for a device."""

    def __init__(self, **options: Any) -> None:
        self.own, self.plain = DynamicLabelSmoothing(**options), DynamicLabelSmoothing(**options)

    def step(self, logits: Tensor, target: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return loss and gradient of each, after a look at the statistics of both."""
        results = []
        for criterion, kernels in ((self.own, True), (self.plain, False)):
            with pytest.MonkeyPatch.context() as patch:
                on_a_device(patch, kernels=kernels)
                leaf = logits.clone().requires_grad_()
                loss = criterion(leaf, target, numbers)
                assert ("Fused" in loss.grad_fn.name()) == kernels
                results += [loss.detach(), torch.autograd.grad(loss * 3, leaf)[0]]
        for name, value in self.plain.state_dict().items():
            torch.testing.assert_close(self.own.state_dict()[name], value, rtol=1e-3, atol=1e-6)
        return tuple(results)


def loss_of(
    logits: Tensor, target: Tensor, criterion: DynamicLabelSmoothing, numbers: Tensor | None = None
) -> Tensor | None:
    """Return what the kernels give for labels that no criterion has looked at; None where they do not take them."""
    return way.loss_on_a_device(logits, way.LabelStep(target, criterion.source, numbers, 0.5, 0.0, -100))


ALL = [(options, torch.float32) for options in OF_SOURCE.values()]
HALF = [(OF_SOURCE[kind], dtype) for kind in KINDS for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("options", "dtype"), ALL + HALF, ids=str)
def test_losses_gradients_and_statistics_are_those_of_pytorchs_operations(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    both = Compared(**options)
    for number in range(3):
        loss, gradient, expected, of_expected = both.step(*step(number, dtype=dtype))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        exact = dtype == torch.float32
        torch.testing.assert_close(gradient, of_expected, rtol=1e-4 if exact else 1e-2, atol=1e-6)
        if number == 1:
            both.own.end_epoch(), both.plain.end_epoch()
    if both.own.means:
        assert both.own.counts.any()
    if both.own.past:
        assert both.own.past.table.any(dim=1).sum() > ROWS


@of_each_kind
@pytest.mark.parametrize("hidden", [-torch.inf, -1e4, torch.finfo(torch.float32).min])
def test_an_impossible_class_takes_no_share(options: dict[str, Any], hidden: float) -> None:
    both = Compared(**options)
    for number in range(2):
        logits, target, numbers = step(number)
        logits[:, 7:17] = hidden if number else logits[:, 7:17]
        loss, gradient, expected, of_expected = both.step(logits, target, numbers)
        assert loss.isfinite()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, of_expected, rtol=1e-4, atol=1e-6)


@of_each_kind
@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_reaches_no_statistics(options: dict[str, Any], strange: float) -> None:
    both = Compared(**options)
    both.step(*step(0))
    logits, target, numbers = step(1)
    logits[1, 4] = strange
    loss, _, expected, _ = both.step(logits, target, numbers)
    assert loss.isnan()
    assert expected.isnan()
    assert all(value.isfinite().all() for value in both.own.state_dict().values())


@of_each_kind
def test_where_all_labels_are_ignored_the_loss_is_nan(options: dict[str, Any]) -> None:
    logits, target, numbers = step(0)
    loss, _, expected, _ = Compared(**options).step(logits, target.fill_(-100), numbers)
    assert loss.isnan()
    assert expected.isnan()


@pytest.mark.parametrize("update", ["running", "epoch"])
def test_class_means_are_summed_over_the_ranks(monkeypatch: pytest.MonkeyPatch, update: str) -> None:
    """Two ranks that have the same step: what both have is twice what one has."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda values: values.mul_(2))
    both = Compared(mode="class_mean", update=update)
    both.step(*step(0))
    assert set(both.own.counts.tolist()) == {0, 2}


def test_past_predictions_that_ranks_exchange_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_device(monkeypatch)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for sync in (True, False):
        criterion = DynamicLabelSmoothing("past", num_samples=SAMPLES, sync=sync)
        logits, target, numbers = step(0)
        assert (loss_of(logits, target, criterion, numbers) is None) == sync


def test_a_label_or_number_out_of_range_makes_the_loss_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host does not look: PyTorch's operations would end the process's use of the device."""
    on_a_device(monkeypatch)
    logits, target, numbers = step(0)
    for wrong in (CLASSES, -1):
        given = target.clone()
        given[3] = wrong
        for options in ({"mode": "uniform"}, {"mode": "class_mean"}):
            found = loss_of(logits, given, DynamicLabelSmoothing(**options))
            assert found is not None
            assert found.isnan(), (wrong, options)
    criterion = DynamicLabelSmoothing("past", num_samples=SAMPLES)
    for wrong in (SAMPLES, -1):
        given = numbers.clone()
        given[3] = wrong
        found = loss_of(logits, target, criterion, given)
        assert found is not None
        assert found.isnan()
    assert criterion.past is not None
    assert criterion.past.table.isfinite().all()


@of_each_kind
def test_any_layout_and_any_integer_will_do(options: dict[str, Any]) -> None:
    """Columns of a table of labels, every second of a batch, one label for all."""
    logits, target, numbers = step(0)
    expected = Compared(**options).step(logits, target, numbers)
    table, every_second = torch.stack([target, target + 1], dim=1), torch.stack([numbers, numbers + 1], dim=1).flatten()
    for given in (
        (logits.T.contiguous().T, target.int(), numbers.to(torch.int32)),
        (torch.stack([logits, logits], dim=2)[..., 0], table[:, 0], every_second[::2]),
    ):
        for own, plain in zip(Compared(**options).step(*given), expected, strict=True):
            torch.testing.assert_close(own, plain)
    one_for_all = torch.tensor(3, device=DEVICE).expand(ROWS)
    own, _, plain, _ = Compared(**options).step(logits, one_for_all, numbers)
    torch.testing.assert_close(own, plain)


@of_each_kind
def test_a_state_may_be_of_any_layout(options: dict[str, Any]) -> None:
    both = Compared(**options)
    both.step(*step(0))
    for criterion in (both.own, both.plain):
        transposed = {
            name: each.T.contiguous().T if each.ndim == 2 else each for name, each in criterion.state_dict().items()
        }
        criterion.load_state_dict(transposed)
    for number in (1, 2):
        loss, _, expected, _ = both.step(*step(number))
        torch.testing.assert_close(loss, expected)


def test_an_error_of_the_caller_is_raised_and_the_kernels_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_device(monkeypatch)
    criterion = DynamicLabelSmoothing("past", num_samples=SAMPLES)
    criterion(*step(0))
    logits, target, numbers = step(1)
    with pytest.raises(ValueError, match="past predictions are of shape"):
        criterion(logits[:, :9], target, numbers)
    torch.func.grad(lambda leaf: DynamicLabelSmoothing("uniform")(leaf, target))(logits)
    torch.func.vmap(lambda leaf: fitted(leaf, target, -100))(logits[None])
    assert not way.label_kernels.given_up


@pytest.mark.parametrize("mode", ["uniform", "class_mean"])
def test_numbers_that_nobody_asks_for_are_not_looked_at(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    on_a_device(monkeypatch)
    logits, target, _ = step(0)
    loss = DynamicLabelSmoothing(mode)(logits, target, torch.empty(ROWS, device="meta"))
    torch.testing.assert_close(loss, DynamicLabelSmoothing(mode)(logits, target))


def test_logits_too_far_apart_for_the_kernels_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_device(monkeypatch)
    labels = torch.zeros(2, dtype=torch.long, device="meta")
    near, far = (torch.empty(2 * size, device="meta").as_strided((2, 4), (1, size // 4)) for size in (2**30, 2**31))
    monkeypatch.setattr(way, "label_kernels", OptionalSolver("triton", lambda: lambda *_: "the kernels", ""))
    assert way.fitted_on_a_device(near, labels, -100) == "the kernels"
    assert way.fitted_on_a_device(far, labels, -100) is None


@of_each_kind
def test_the_gradient_can_be_differentiated(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, numbers = step(0)
    second = []
    for kernels in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            on_a_device(patch, kernels=kernels)
            leaf = logits.clone().requires_grad_()
            (first,) = torch.autograd.grad(
                DynamicLabelSmoothing(**options)(leaf, target, numbers), leaf, create_graph=True
            )
            second += torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-6)


def test_kernels_that_do_not_start_are_replaced_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("no compiler")

    on_a_device(monkeypatch)
    logits, target, _ = step(0)
    expected = F.cross_entropy(logits, target, label_smoothing=0.1)
    monkeypatch.setattr(fused, "loss_kernel", Broken())
    criterion = DynamicLabelSmoothing("uniform")
    with pytest.warns(UserWarning, match=r"kernels of the label term do not run here.*no compiler"):
        torch.testing.assert_close(criterion(logits, target), expected)
    torch.testing.assert_close(criterion(logits, target), expected)


@pytest.mark.parametrize(
    ("options", "made"),
    [
        ({"mode": "uniform"}, {"dtype": torch.float64}),
        ({"mode": "uniform"}, {"shape": (2, CLASSES, 3)}),
        ({"mode": "class_mean", "alpha": 0.5}, {"soft": True}),
        ({"mode": "uniform"}, {"shape": (0, CLASSES)}),
        ({"mode": "class_mean"}, {"shape": (2, 2049)}),
    ],
    ids=["float64", "pixels", "soft targets", "empty", "many classes"],
)
def test_what_the_kernels_cannot_do_is_done_by_pytorch(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], made: dict[str, Any]
) -> None:
    on_a_device(monkeypatch)
    monkeypatch.setattr(fused, "loss_kernel", None)
    logits = torch.randn(made.get("shape", (4, CLASSES)), dtype=made.get("dtype"), requires_grad=True)
    target = logits.detach().softmax(dim=1) if made.get("soft") else torch.zeros(len(logits), *logits.shape[2:]).long()
    loss = DynamicLabelSmoothing(**options)(logits, target)
    assert loss.isfinite() or not len(logits)
    assert "Fused" not in loss.grad_fn.name()


@of_each_source
def test_kernels_are_launched_on_the_device_of_the_logits(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = OnItsDevice(monkeypatch)
    on_a_device(monkeypatch)
    for name in KERNELS:
        monkeypatch.setattr(fused, name, kernel)
    DynamicLabelSmoothing(**options)(*step(0))
    assert kernel.launches


@of_each_source
def test_a_label_term_launches_eight_kernels(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without a GPU, forward and backward together; by PyTorch's operations it is up to sixty."""
    kernel = OnItsDevice(monkeypatch)
    on_a_device(monkeypatch)
    for name in KERNELS:
        monkeypatch.setattr(fused, name, kernel)
    numbers = torch.arange(8, device="meta") if options["mode"] == "past" else None
    smoothing_of = {name.replace("mode", "smoothing"): value for name, value in options.items()}
    counts = []
    for settings in (smoothing_of, {}):
        of_step = StepWithoutMemory(gate="none", feature_weight=0.0, index=numbers, **settings)
        of_step()  # creates what is created once
        kernel.launches = 0
        counts.append(of_step() + kernel.launches)
    of_cross_entropy = 4
    assert 4 <= counts[0] - counts[1] + of_cross_entropy <= 8


LAUNCH = """
import torch
from sfr.labels import DynamicLabelSmoothing, smoothing
from sfr.labels.fitted import fitted

smoothing.may_hold_impossible = lambda _: True
for classes, dtype in ((2, torch.float32), (2048, torch.bfloat16), (6000, torch.float16)):
    for options in (
        {"mode": "uniform", "alpha": 1.0},
        {"mode": "class_mean", "momentum": 1},
        {"mode": "class_mean", "update": "epoch", "ignore_index": 1},
        {"mode": "past", "num_samples": 3, "alpha": 0.3},
        {"mode": "past", "num_samples": 1, "momentum": 0.5, "alpha": 1},
        {"mode": "past", "num_samples": 3, "alpha": 0, "early_learning": 3},
    ):
        if classes > 2048 and options["mode"] == "class_mean":
            continue
        criterion = DynamicLabelSmoothing(**options)
        for rows in (1, 3):
            logits = torch.randn(rows, classes).to(dtype).requires_grad_()
            target = torch.zeros(rows, dtype=torch.int16)
            criterion(logits, target, torch.zeros(rows).int()).backward()
            fitted(logits, target, -100)
print(dict(sorted(launches.items())))
"""


def test_the_kernels_start_on_gpus_that_are_not_there(tmp_path: Any) -> None:
    (line,) = run_for_a_gpu(LAUNCH, tmp_path)
    started = {"loss_kernel": 32, "fitted_kernel": 32, "keep_kernel": 18, "early_kernel": 6, "class_sums_kernel": 8}
    started["move_kernel"] = 4
    assert ast.literal_eval(line) == started
