"""Files that are old or new, never torn, with their SHA-256 beside them in the form that `sha256sum --check` reads.

`checkpoint-last.pth.sha256` holds the sum of `checkpoint-last.pth`. Two files cannot be replaced in one instant: while
the checkpoint is being replaced, the other one holds two sums, of the old content and of the new, and either is right.
"""

import contextlib
import fcntl
import hashlib
import math
import os
from collections.abc import Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO

CHUNK = 2**20  # bytes that are read at once
known_sums: dict[tuple, str] = {}  # SHA-256 of files that this process has seen, by name, size and time; '' if damaged


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


class Summed(BufferedReader):
    """A file to read from its beginning to its end, without a seek, that sums up what it reads, if there is a sum.

    It allocates no more for a read than it has bytes, whatever is asked of it. Not a memory map: there, storage that
    fails ends the process by SIGBUS, where a read is an error in one line.
    """

    def __init__(self, path: Path):
        raw = SummedBytes(path)
        super().__init__(raw, CHUNK)
        self.path, self.sum = path, raw.sum
        self.mark = fingerprint(path, os.fstat(self.fileno()))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, count: int) -> bytes:
        return super().read(min(count, self.size))

    def skip(self, count: float = math.inf) -> None:
        """Read on, so many bytes or to the end."""
        while count > 0 and (chunk := self.read(min(count, CHUNK))):
            count -= len(chunk)

    def agrees(self) -> bool:
        """Whether the whole file is what its sum says; so is one that has none. To be asked at its end."""
        if self.sum:
            digest = self.sum.hexdigest()
            known_sums[self.mark] = digest if digest in read_sums(self.path) else ''
        return not self.sum or bool(known_sums[self.mark])


class SummedBytes(FileIO):
    """What `Summed` reads from."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.sum = hashlib.sha256() if beside(path).exists() else None

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        if self.sum:
            self.sum.update(memoryview(buffer)[:count])
        return count


def fingerprint(path: Path, stat: os.stat_result | None = None) -> tuple:
    stat = stat or path.stat()
    return path, stat.st_ino, stat.st_size, stat.st_mtime_ns


def good_sum(path: Path) -> str:
    """The SHA-256 of a file that agrees with it, or has none, else ''. Made once for a file that stays."""
    mark = fingerprint(path)
    if mark not in known_sums:
        known_sums[mark] = sum_of(path) if agrees(path) else ''
    return known_sums[mark]


def put(temporary: Path, digest: str, path: Path) -> None:
    """Move a file of this sum to its place; at any instant, what lies there agrees with the sum beside it."""
    if before := read_sums(path):
        write_sums(path, [digest, *before])
    os.replace(temporary, path)
    write_sums(path, [digest])
    flush_folder(path.parent)
    known_sums[fingerprint(path)] = digest


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    beside(path).unlink(missing_ok=True)
