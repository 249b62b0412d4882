"""Whether the code runs inside ``join()`` of DistributedDataParallel, which does not tell when it ends."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel


class Joining:
    """The ``join()`` that the last forward of a model was in."""

    def __init__(self) -> None:
        self._config: Any = None
        self._context: weakref.ref[Join] | None = None

    def note_forward(self) -> None:
        """Take note, inside a forward, which ``join()`` it is in, if its DDP model says that it is in one."""
        parallel = DistributedDataParallel._active_ddp_module
        config = None if parallel is None else parallel._join_config
        if config is None or not config.enable:
            self._config = self._context = None
        elif config is not self._config:
            # DDP goes on to say so after the end of join(). Its context is alive as long as the code is inside.
            self._config = config
            contexts = (each for each in gc.get_objects() if issubclass(type(each), Join))
            inside = (context for context in contexts if any(each is parallel for each in context._joinables))
            self._context = next(map(weakref.ref, inside), None)

    @property
    def inside(self) -> bool:
        """Whether that ``join()`` is still going on."""
        return self._context is not None and self._context() is not None
