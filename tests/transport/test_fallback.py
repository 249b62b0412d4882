"""Optional packages that are missing, broken or cannot write: one warning, and plans from the next solver."""

import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sfr.transport import exact, solve
from sfr.transport.fallback import OptionalSolver

dispatch = sys.modules[solve.__module__]
needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba")


def optimum(cost: Tensor) -> Tensor:
    found = [problem[linear_sum_assignment(problem)].mean() for problem in cost.numpy()]
    return torch.tensor(np.array(found), dtype=cost.dtype)


def assert_optimal(plan: Tensor, cost: Tensor) -> None:
    torch.testing.assert_close(plan.sum(dim=2), torch.full(cost.shape[:2], 1 / cost.shape[1]))
    torch.testing.assert_close(plan.sum(dim=1), torch.full(cost.shape[::2], 1 / cost.shape[2]))
    torch.testing.assert_close((plan * cost).sum(dim=(1, 2)), optimum(cost))


def assert_one_warning(match: str) -> None:
    """Two batches are solved exactly, the first with one warning that matches, the second with none."""
    cost = torch.rand(3, 8, 8)
    with pytest.warns(UserWarning, match=match) as caught:
        assert_optimal(solve(cost), cost)
    assert len(caught) == 1, [str(each.message) for each in caught]
    assert_no_warning()


def assert_no_warning() -> None:
    cost = torch.rand(3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_optimal(solve(cost), cost)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what came of trying the compiled solver, as in a new process."""
    solver = OptionalSolver("numba", exact._load_assignment, exact.compiled_assignment.failure)
    monkeypatch.setattr(exact, "compiled_assignment", solver)


@contextmanager
def forgotten(*names: str) -> Iterator[None]:
    """Modules count as not imported, inside and until their next import."""
    modules = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(modules)
        for name, module in modules.items():
            package, _, attribute = name.rpartition(".")
            setattr(sys.modules[package], attribute, module)  # an import sets it, too


@pytest.fixture
def not_imported(untried: None) -> Iterator[None]:
    with forgotten("sfr.transport.assignment", "sfr.transport.semi_assignment", "sfr.transport.numba_functions"):
        yield


def fake_numba(njit: Any) -> ModuleType:
    fake = ModuleType("numba")
    fake.njit, fake.config = njit, object()  # type: ignore[attr-defined]
    return fake


def lacks_a_library(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ModuleNotFoundError("No module named 'llvmlite'", name="llvmlite")


broken = ModuleType("numba")
broken.__getattr__ = lacks_a_library  # type: ignore[method-assign]


def does_not_decorate(**options: Any) -> Any:
    raise OSError("could not load libllvmlite.so")


def does_not_compile(**options: Any) -> Any:
    def decorator(function: Any) -> Any:
        def call(*arguments: Any) -> None:
            raise TypeError("no implementation of function Function(<built-in function min>)")

        call.py_func = function  # type: ignore[attr-defined]
        return call

    return decorator


def computes_nonsense(**options: Any) -> Any:
    def decorator(function: Any) -> Any:
        def call(costs: Any, plans: Any, prices: Any) -> None:
            plans[:] = 0

        call.py_func = function  # type: ignore[attr-defined]
        return call

    return decorator


@pytest.mark.usefixtures("not_imported")
@pytest.mark.parametrize(
    ("numba", "reason"),
    [
        (fake_numba(does_not_decorate), "could not load libllvmlite.so"),
        (fake_numba(does_not_compile), "no implementation of function"),
        (fake_numba(computes_nonsense), r"it found \[0, 0, 0\]"),
        (ModuleType("numba"), "cannot import name"),
        (broken, "No module named 'llvmlite'"),
    ],
    ids=["does not decorate", "does not compile", "computes nonsense", "is an empty folder", "lacks a library"],
)
def test_a_numba_that_does_not_work_is_one_warning_and_scipy_solves(
    monkeypatch: pytest.MonkeyPatch, numba: ModuleType, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "numba", numba)
    assert_one_warning(f"numba does not work here, so scipy and POT solve .* The reason: .*{reason}")


@pytest.mark.usefixtures("not_imported")
def test_without_numba_scipy_solves_and_there_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert_no_warning()
    assert exact.compiled_assignment.given_up


def grouped_optimum(cost: Tensor) -> Tensor:
    """The least cost of problems (B, N, M), N = kM, with uniform masses: an assignment to k copies of each column."""
    return optimum(cost.repeat_interleave(cost.shape[1] // cost.shape[2], dim=2))


@pytest.mark.usefixtures("not_imported")
def test_without_numba_pot_solves_where_one_side_has_several_times_as_many_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    cost = torch.rand(3, 12, 4)
    torch.testing.assert_close((solve(cost) * cost).sum(dim=(1, 2)), grouped_optimum(cost))
    assert exact.compiled_assignment.given_up


@needs_numba
@pytest.mark.usefixtures("untried")
def test_a_failure_of_one_compiled_solver_is_one_warning_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> None:
        raise SystemError("returned NULL without setting an exception")

    monkeypatch.setattr(exact, "_assigned", failing)
    cost = torch.rand(3, 12, 4)
    with pytest.warns(UserWarning, match="numba does not work here"):
        torch.testing.assert_close((solve(cost) * cost).sum(dim=(1, 2)), grouped_optimum(cost))
    assert_no_warning()


@needs_numba
@pytest.mark.usefixtures("not_imported")
def test_a_numba_that_must_not_compile_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert_one_warning("numba does not work here.*NUMBA_DISABLE_JIT")


@needs_numba
@pytest.mark.usefixtures("untried")
def test_a_failure_at_a_later_call_is_one_warning_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_no_warning()

    def failing(*arguments: Any) -> None:
        raise SystemError("returned NULL without setting an exception")

    monkeypatch.setattr(exact.compiled_assignment, "_solver", failing)
    assert_one_warning("numba does not work here.*returned NULL")


IMPORT = """
import sys, warnings, torch
from sfr.transport import solve
warnings.simplefilter("always")
cost = torch.tensor([[2.0, 1.0, 3.0], [1.0, 3.0, 2.0], [3.0, 2.0, 1.0]])
for _ in range(3):
    print(3 * (solve(cost) * cost).sum().item(), "scipy.optimize" in sys.modules)
"""
REFUSAL = "raise ImportError('Numba needs NumPy 2.3 or less. Got NumPy 2.4.')"


def test_a_numba_that_cannot_be_imported_is_one_warning_in_the_process(tmp_path: Path) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(REFUSAL)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.splitlines() == ["3.0 True"] * 3, run.stderr
    assert run.stderr.count("Warning: ") == 1
    assert "numba does not work here, so scipy and POT solve the transport problems" in run.stderr
    assert "Numba needs NumPy 2.3 or less" in run.stderr


class Lines(logging.Handler):
    """What was logged, a line each."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def first_load(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with what numba keeps of the compiled solver, and what was logged when it was compiled."""
    import numba

    from sfr.transport.assignment import load
    from sfr.transport.numba_functions import logger

    folder, log = tmp_path_factory.mktemp("cache"), Lines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba.config, "CACHE_DIR", str(folder))
        patch.setattr(logger, "handlers", [log])
        load(cached=True)
    return folder, log.lines


@pytest.fixture
def filled_cache(first_load: tuple[Path, list[str]]) -> Path:
    return first_load[0]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, untried: None) -> Path:
    """An empty folder that numba uses for its cache, as with NUMBA_CACHE_DIR."""
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def cached_files(cache: Path, kind: str) -> list[Path]:
    return sorted(cache.rglob(f"*.{kind}"))


@needs_numba
def test_the_compiled_solver_is_kept_in_numbas_cache_and_taken_from_it(cache: Path, filled_cache: Path) -> None:
    from sfr.transport.assignment import load

    assert [len(cached_files(filled_cache, kind)) for kind in ("nbi", "nbc")] == [1, 1]
    shutil.copytree(filled_cache, cache, dirs_exist_ok=True)
    assert sum(load(cached=True).stats.cache_hits.values()) == 1
    assert_no_warning()


@needs_numba
def test_compiling_for_the_cache_is_one_logged_line_and_reading_it_is_none(
    cache: Path, first_load: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, lines = first_load
    assert len(lines) == 1
    assert re.fullmatch(r"compiled the transport solver in \d+\.\d s; numba's cache on this machine keeps it", lines[0])
    shutil.copytree(folder, cache, dirs_exist_ok=True)
    assert_no_warning()
    assert not caplog.records


DAMAGES = {
    "cut index": ("nbi", lambda content: content[: len(content) // 2]),
    "empty index": ("nbi", lambda content: b""),
    "foreign index": ("nbi", lambda content: b"<html>" + content),
    "cut code": ("nbc", lambda content: content[: len(content) // 2]),
    "empty code": ("nbc", lambda content: b""),
    "foreign code": ("nbc", lambda content: pickle.dumps([1, 2, 3])),
}


@needs_numba
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_one_warning_and_the_solver_is_compiled_without(
    cache: Path, filled_cache: Path, damage: str
) -> None:
    shutil.copytree(filled_cache, cache, dirs_exist_ok=True)
    kind, change = DAMAGES[damage]
    (file,) = cached_files(cache, kind)
    file.write_bytes(change(file.read_bytes()))
    assert_one_warning("numba cannot use its cache .* set NUMBA_CACHE_DIR to an empty folder .* The reason: ")
    assert not exact.compiled_assignment.given_up


@needs_numba
@pytest.mark.parametrize("place", ["ensure_cache_path", "save"])
def test_a_cache_that_cannot_be_written_is_one_warning_and_the_solver_is_compiled_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from numba.core import caching

    errors = {"ensure_cache_path": PermissionError(13, "read-only"), "save": OSError(28, "No space left on device")}

    def refuse(*arguments: Any) -> None:
        raise errors[place]

    owners = {"ensure_cache_path": caching._CacheLocator, "save": caching.IndexDataCacheFile}
    monkeypatch.setattr(owners[place], place, refuse)
    assert_one_warning("numba cannot use its cache .*(cannot cache function|No space left)")
    assert not cached_files(cache, "nbi")
    assert not exact.compiled_assignment.given_up


@pytest.fixture
def untried_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors pass for those of a CUDA device, and the fused kernel was not tried yet."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    solver = OptionalSolver("triton", dispatch._load_fused, dispatch.fused_solver.failure)
    monkeypatch.setattr(dispatch, "fused_solver", solver)
    with forgotten("sfr.transport.fused"):
        yield


def assert_eager(match: str | None) -> None:
    """Two batches get the eager solver's plans, the first with one warning that matches, or none."""
    cost = torch.rand(2, 6, 6)
    expected = solve(cost.double(), solver="proximal").float()  # the kernel takes no float64
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(solve(cost, solver="proximal"), expected, rtol=1e-3, atol=1e-5)
    assert len(caught) == (match is not None), [str(each.message) for each in caught]
    if match is not None:
        assert match in str(caught[0].message)


@pytest.mark.usefixtures("untried_kernel")
def test_a_triton_that_cannot_be_imported_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert_eager("the fused transport kernel does not run here")


@pytest.mark.usefixtures("untried_kernel")
def test_without_triton_there_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert_eager(None)


@pytest.mark.usefixtures("untried_kernel")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("0 active drivers ([]). There should only be one."),
        OSError(2, "No such file or directory: 'gcc'"),
        subprocess.CalledProcessError(1, ["gcc"]),
        ImportError("libcuda.so.1: cannot open shared object file"),
        AssertionError("libcuda.so cannot found!"),
    ],
    ids=["no driver", "no compiler", "compiler fails", "no library", "assertion"],
)
def test_a_kernel_that_does_not_start_is_one_warning(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fused = ModuleType("sfr.transport.fused")

    def fused_plan(*arguments: Any, **options: Any) -> Tensor:
        raise error

    fused.fused_plan = fused_plan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sfr.transport.fused", fused)
    assert_eager(repr(error))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_running_out_of_memory_is_raised_and_the_solver_is_tried_again(error: Exception) -> None:
    results: list[Any] = [error, "plan"]

    def solver() -> Any:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    optional = OptionalSolver("numba", lambda: solver, "it does not work")
    with pytest.raises(type(error)):
        optional()
    assert optional() == "plan"
