"""Files that are old or new, never torn, with their SHA-256 beside them in the form that `sha256sum --check` reads.

`checkpoint-last.pth.sha256` holds the sum of `checkpoint-last.pth`. Two files cannot be replaced in one instant: while
the checkpoint is being replaced, the other one holds two sums, of the old content and of the new, and either is right.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class Hashing:
    """A file to write to that sums up what goes through it, and remembers what went wrong."""

    def __init__(self, file: BinaryIO):
        self.file, self.sum = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data) -> int:
        self.sum.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def temporary_for(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to and then rename; what is left of it at the end is removed."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def flushed(path: Path) -> Iterator[BinaryIO]:
    """A new file whose content is on the disk when it is closed."""
    with open(path, 'wb') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Write a small file; a kill at any instant leaves the old content or the new."""
    with temporary_for(path) as temporary:
        with flushed(temporary) as file:
            file.write(content)
        os.replace(temporary, path)


def flush_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Processes of a machine that hold this lock file take turns. A process that dies lets go of it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------
# sums


def beside(path: Path) -> Path:
    """Where the sum of a file lies."""
    return path.with_name(f'{path.name}.sha256')


def read_sums(path: Path) -> list[str]:
    """What the sum of a file may be; empty if it has none."""
    try:
        lines = beside(path).read_text(encoding='utf-8', errors='replace').splitlines()
    except FileNotFoundError:
        return []
    return [line.partition(' ')[0] for line in lines]


def write_sums(path: Path, sums: list[str]) -> None:
    replace(beside(path), ''.join(f'{digest}  {path.name}\n' for digest in sums).encode())


def agrees(path: Path) -> bool:
    """Whether a file is what its sum says; so is one that has none."""
    return not beside(path).exists() or sum_of(path) in read_sums(path)


def sum_of(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def put(temporary: Path, digest: str, path: Path) -> None:
    """Move a file of this sum to its place; at any instant, what lies there agrees with the sum beside it."""
    if before := read_sums(path):
        write_sums(path, [digest, *before])
    os.replace(temporary, path)
    write_sums(path, [digest])
    flush_folder(path.parent)


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    beside(path).unlink(missing_ok=True)
