"""Runs a function in several processes that are the ranks of a group, or in a process of its own.

They are forked from a server that has loaded what they need, see ranks_load.py: a process that starts from nothing
imports for eight seconds before its first step. Nor can they be forked from the process of the tests, because a fork of
a process that has gone back through a graph cannot do so itself.
"""

import functools
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing

PATIENCE = timedelta(seconds=60)  # with a rank that others wait for
LIMIT = 300  # seconds for all of it


def run_ranks(
    function: Callable[..., Any], *arguments: Any, ranks: int = 2, environment: dict[str, str] | None = None
) -> list[Any]:
    """Call ``function(rank, *arguments)`` in each rank of a group over gloo, and return what each call returned.

    Args:
        function: a module's own; each rank loads that module anew.
        arguments: what can be pickled.
        ranks: a single one has no group.
        environment: variables that are set before the module is loaded.

    Returns:
        Results in the order of the ranks; they must be what ``torch.load`` takes with ``weights_only=True``.

    Raises:
        torch.multiprocessing.ProcessRaisedException: the error of the first rank that has one.
        torch.multiprocessing.ProcessExitedException: if a rank is killed or exits with another status than 0.
        TimeoutError: after five minutes.
    """
    start_server()
    file = sys.modules[function.__module__].__file__
    with tempfile.TemporaryDirectory() as folder:
        of_one_rank = (ranks, folder, environment or {}, file, function.__name__, arguments)
        wait_for(torch.multiprocessing.start_processes(in_rank, of_one_rank, ranks, False, False, "forkserver"))
        return [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(ranks)]


def wait_for(started: torch.multiprocessing.ProcessContext) -> None:
    end = time.monotonic() + LIMIT
    while not started.join(timeout=max(0.0, end - time.monotonic())):
        if time.monotonic() >= end:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"the processes have not ended within {LIMIT} seconds")


@functools.cache
def start_server() -> None:
    """Once for each process of the tests, whose path the server shall have already when it loads."""
    multiprocessing.set_forkserver_preload(["ranks_load"])
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()


def in_rank(
    rank: int,
    ranks: int,
    folder: str,
    environment: dict[str, str],
    file: str,
    name: str,
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # read by Accelerate, used by nobody
        meeting = f"file://{folder}/store"  # no port is needed
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=PATIENCE)
    torch.save(getattr(load_module(file), name)(rank, *arguments), f"{folder}/{rank}")
    if dist.is_initialized():  # else the function has ended the group itself
        dist.barrier()  # a rank that ended while gloo's threads still let go of its last message could crash
        dist.destroy_process_group()


def load_module(file: str) -> Any:
    """Load a module of the tests by its file, whatever else is called ``tests`` on the path."""
    spec = importlib.util.spec_from_file_location("module_of_ranks", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
