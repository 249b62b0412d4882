"""The kernels of the label term: under Triton's interpreter they give what PyTorch's operations give."""

import os
import subprocess
import sys
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
}
# NumPy, by which the interpreter computes, warns of each NaN.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
of_each_source = pytest.mark.parametrize("options", OF_SOURCE.values(), ids=OF_SOURCE)


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


@of_each_source
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
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


@of_each_source
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


@of_each_source
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


@of_each_source
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
        source = DynamicLabelSmoothing("past", num_samples=SAMPLES, sync=sync).source
        assert (way.loss_on_a_device(*step(0)[:2], source, step(0)[2], 0.5, -100) is None) == sync


def test_a_label_or_number_out_of_range_makes_the_loss_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host does not look: PyTorch's operations would end the process's use of the device."""
    on_a_device(monkeypatch)
    logits, target, numbers = step(0)
    for wrong in (CLASSES, -1):
        given = target.clone()
        given[3] = wrong
        for options in ({"mode": "uniform"}, {"mode": "class_mean"}):
            found = fused.fused_loss(logits, given, DynamicLabelSmoothing(**options).source, None, 0.5, -100)
            assert found.isnan(), (wrong, options)
    criterion = DynamicLabelSmoothing("past", num_samples=SAMPLES)
    for wrong in (SAMPLES, -1):
        given = numbers.clone()
        given[3] = wrong
        assert fused.fused_loss(logits, target, criterion.source, given, 0.5, -100).isnan()
    assert criterion.past is not None
    assert criterion.past.table.isfinite().all()


@of_each_source
def test_any_layout_of_the_logits_and_any_integer_will_do(options: dict[str, Any]) -> None:
    logits, target, numbers = step(0)
    expected = Compared(**options).step(logits, target, numbers)
    found = Compared(**options).step(logits.T.contiguous().T, target.int(), numbers.to(torch.int32))
    for own, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(own, plain)


@of_each_source
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


class Counted:
    """Stands in for a kernel and counts its launches."""

    launches = 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*_: Any, **__: Any) -> None:
            Counted.launches += 1

        return launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gate_is_that_of_pytorchs_operations(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    logits, target, _ = step(0, rows=8, dtype=dtype)
    logits[3, 1], logits[4, 1], logits[5], logits[6, target[6]] = torch.nan, torch.inf, -torch.inf, -torch.inf
    expected = fitted(logits, target, -100)
    on_a_device(monkeypatch)
    monkeypatch.setattr(F, "cross_entropy", None)
    torch.testing.assert_close(fitted(logits, target.int(), -100), expected)
    assert expected[:3].all()
    assert expected[2] == 1


KERNELS = ("loss_kernel", "keep_kernel", "class_sums_kernel", "move_kernel", "fitted_kernel")


@of_each_source
def test_a_label_term_launches_eight_kernels(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without a GPU, forward and backward together; by PyTorch's operations it is up to sixty."""
    on_a_device(monkeypatch)
    for name in KERNELS:
        monkeypatch.setattr(fused, name, Counted())
    numbers = torch.arange(8, device="meta") if options["mode"] == "past" else None
    smoothing_of = {name.replace("mode", "smoothing"): value for name, value in options.items()}
    counts = []
    for settings in (smoothing_of, {}):
        of_step = StepWithoutMemory(gate="none", feature_weight=0.0, index=numbers, **settings)
        of_step()  # creates what is created once
        Counted.launches = 0
        counts.append(of_step() + Counted.launches)
    of_cross_entropy = 4
    assert 4 <= counts[0] - counts[1] + of_cross_entropy <= 8


COMPILE = """
import inspect, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sfr.labels import kernels

keyword = "constexprs" if "constexprs" in inspect.signature(ASTSource).parameters else "constants"  # its older name
floats = ("loss_ptr", "gradient_ptr", "sides_ptr", "sums_ptr", "distributions_ptr", "counts_ptr", "fitted_ptr")
kinds = dict.fromkeys(floats, "*fp32") | {"logits_ptr": "*bf16", "table_ptr": "*fp16", "correct_ptr": "*i32"}
kinds |= dict.fromkeys(("target_ptr", "numbers_ptr", "count_ptr"), "*i64")
kinds |= dict.fromkeys(("alpha", "left_to_labels", "momentum", "log_rest"), "fp32")
for capability, kernel, own, constants in (
    (80, kernels.loss_kernel, {"towards_ptr": "*fp32"}, {"SOURCE": 0, "BLOCK": 4096}),
    (90, kernels.loss_kernel, {"towards_ptr": "*fp32"}, {"SOURCE": 1, "BLOCK": 128, "of_class": 1}),
    (80, kernels.loss_kernel, {"towards_ptr": "*fp16", "logits_ptr": "*fp32"}, {"SOURCE": 2, "BLOCK": 1024}),
    (90, kernels.keep_kernel, {}, {"BLOCK": 128}),
    (80, kernels.class_sums_kernel, {}, {"BLOCK": 2048}),
    (90, kernels.move_kernel, {}, {"BLOCK": 128}),
    (80, kernels.fitted_kernel, {}, {"BLOCK": 1024}),
):
    of_all = kinds | own | dict.fromkeys(constants, "constexpr")
    signature = {name: of_all.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, **{keyword: constants})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    assert len(compiled.asm["cubin"]) > 1000
print("all compiled")
"""


def test_the_kernels_compile_for_gpus_that_are_not_there(tmp_path: Any) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert run.stdout.strip() == "all compiled", run.stderr
