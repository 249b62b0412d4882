"""Checkpoint folders with a manifest of checksums, by which a damaged one is told from a sound one."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from .atomic_file import sync_file, sync_folder

MANIFEST = "manifest.json"
CHUNK = 1 << 20  # bytes


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, the oldest first."""
    found = [folder for folder in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=epoch_of)


def epoch_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, or what is in its place."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def seal(checkpoint: Path) -> None:
    """Write the checksum of every file into the manifest, as the last file; wait until all are on the disk."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    for file in files:
        sync_file(file)
    checksums = {file.relative_to(checkpoint).as_posix(): checksum(file) for file in files}
    (checkpoint / MANIFEST).write_text(json.dumps(checksums, indent=2))
    sync_file(checkpoint / MANIFEST)
    for folder in {file.parent for file in files} | {checkpoint}:
        sync_folder(folder)


def damage(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint is not what was written, and why; None if all are sound."""
    try:
        checksums = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{checkpoint.name}/{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{checkpoint.name}/{MANIFEST} is damaged ({error})"
    if not isinstance(checksums, dict) or not checksums:
        return f"{checkpoint.name}/{MANIFEST} is damaged (it lists no files)"
    for name, expected in checksums.items():
        fault = file_damage(checkpoint / name, expected)
        if fault:
            return f"{checkpoint.name}/{name} {fault}"
    return None


def file_damage(file: Path, expected: str) -> str | None:
    try:
        if checksum(file) == expected:
            return None
        return "does not match its checksum" if file.stat().st_size else "is empty"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"is unreadable ({error})"


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
