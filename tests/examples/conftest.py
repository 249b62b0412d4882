"""Every test starts from a process that has not trained yet."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module", autouse=True)
def _one_thread_on_the_cpu() -> Iterator[None]:
    """As in the subprocesses: sums in another order, or on another device, are other weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_accelerator_yet() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment of a subprocess: this checkout, the CPU, one thread, no network, an empty cache."""
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }


@pytest.fixture
def importing_examples(environment: dict[str, str]) -> dict[str, str]:
    """The same for a subprocess that is no script in examples/, but imports one."""
    return environment | {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, EXAMPLES)))}


@pytest.fixture
def examples() -> Path:
    return EXAMPLES


@pytest.fixture(autouse=True)
def _empty_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes as long as a small run; runs that modules share are begun before this and draw theirs."""
    from matplotlib.figure import Figure

    monkeypatch.setattr("common.run_folder.curves", lambda history: Figure((1, 1)))
