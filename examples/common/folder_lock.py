"""An exclusive lock on a folder that ends with the process that holds it, even when that process is killed."""

import os
import socket
import sys
import warnings
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_held: set[int] = set()  # descriptors of the locks of this process


class FolderLock:
    """The lock of one folder: the operating system's lock on its file `run.lock`, which names the holder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "run.lock"
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock without waiting; return False if another run holds it."""
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(descriptor, self.folder):
            os.close(descriptor)
            return False
        _held.add(descriptor)
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def holder(self) -> str:
        """Return who took the lock last, for a message."""
        return self.file.read_text(errors="replace") or "another process"


def _lock(descriptor: int, folder: Path) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # far behind the text, which stays readable
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # some network file systems have no locks
        warnings.warn(f"{folder} cannot be locked ({error}): make sure that no other run writes into it", stacklevel=2)
    return True


def _let_go_in_child() -> None:
    """A data-loading process that outlives its killed parent must not hold the parent's locks."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
