"""Where images lie: files, members of tar files, or pixels in memory. A data set asks its store for image i.

Each store has `len`, iteration over names, `name(i)`, which messages show, `pixels(i)` or else `open(i)`, a binary
file, `take(indices)`, a store of those images in that order, `+`, and `digest(root)`: what it holds, the same on
machines that have it below different roots.
"""

import hashlib
import io
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from util.errors import UserError, printable

CHUNK = 2**16  # names at a time


class Names:
    """Many names as one block of bytes: the sum of their lengths, and 8 bytes each.

    A Python list of a million strings would be copied, page by page, into every loader process.
    """

    def __init__(self, block: np.ndarray, ends: np.ndarray):
        self.block, self.ends = block, ends  # uint8; int64, of each name

    @classmethod
    def of(cls, names: Iterable[str]) -> 'Names':
        block, ends = bytearray(), array('q')
        for name in names:
            block += os.fsencode(name)
            ends.append(len(block))
        return cls(np.frombuffer(block, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.block[start : self.ends[index]].tobytes())

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), CHUNK):
            for end in self.ends[first : first + CHUNK].tolist():
                yield os.fsdecode(self.block[start:end].tobytes())
                start = end

    def take(self, indices: np.ndarray) -> 'Names':
        starts = np.concatenate([[0], self.ends[:-1]])[indices] if len(indices) else np.empty(0, np.int64)
        ends = np.cumsum(self.ends[indices] - starts)
        parts = [np.empty(0, np.uint8)]
        for first in range(0, len(indices), CHUNK):
            lengths = np.diff(ends[first : first + CHUNK], prepend=ends[first - 1] if first else 0)
            before = np.cumsum(lengths) - lengths
            parts.append(
                self.block[np.repeat(starts[first : first + CHUNK] - before, lengths) + np.arange(lengths.sum())]
            )
        return Names(np.concatenate(parts), ends)

    @classmethod
    def joined(cls, parts: list['Names']) -> 'Names':
        before = np.cumsum([0, *(len(part.block) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, before, strict=False)]
        return cls(np.concatenate([part.block for part in parts]), np.concatenate(ends))


class Files:
    """Image files, by their paths."""

    def __init__(self, paths: Names | Iterable[str]):
        self.paths = paths if isinstance(paths, Names) else Names.of(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def pixels(self, index: int) -> None:
        """They are in a file."""

    def open(self, index: int) -> BinaryIO:
        return open(self.paths[index], 'rb')

    def take(self, indices: np.ndarray) -> 'Files':
        return Files(self.paths.take(indices))

    def __add__(self, other: 'Files') -> 'Files':
        return Files(Names.joined([self.paths, other.paths]))

    def digest(self, root: Path) -> str:
        """Of the paths below the root: a second for a million, as none of the files is looked at."""
        total, prefix = hashlib.sha256(), f'{root}/'
        for path in self:
            total.update(b'\0' + os.fsencode(path.removeprefix(prefix)))
        return total.hexdigest()


class Tar(NamedTuple):
    """A tar file as it was when its index was made."""

    path: str
    size: int
    time: int  # of its last change, in ns


class Shards:
    """Members of tar files, read by position. Names are those of the members: 'a.tar: cat/1.jpg'."""

    def __init__(self, tars: list[Tar], tar: np.ndarray, starts: np.ndarray, lengths: np.ndarray, names: Names):
        self.tars, self.tar = tars, tar  # int32, the place in `tars`
        self.starts, self.lengths, self.names = starts, lengths, names  # int64, of the bytes of each image

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return (f'{self.tars[tar].path}: {name}' for tar, name in zip(self.tar, self.names, strict=True))

    def name(self, index: int) -> str:
        return f'{self.tars[self.tar[index]].path}: {self.names[index]}'

    def pixels(self, index: int) -> None:
        """They are in a file."""

    def open(self, index: int) -> BinaryIO:
        """Raises UserError where the shard is not the one that was indexed."""
        tar, length = self.tars[self.tar[index]], int(self.lengths[index])
        try:
            file = descriptor(tar.path)
            status = os.fstat(file)
            content = os.pread(file, length, int(self.starts[index]))
        except OSError:
            forget(tar.path)  # what is open may be stale
            raise
        if (status.st_size, status.st_mtime_ns) != tar[1:] or len(content) < length:
            raise UserError(f'{printable(tar.path)} has changed since this run began; --resume auto indexes it anew')
        return io.BytesIO(content)

    def take(self, indices: np.ndarray) -> 'Shards':
        columns = (column[indices] for column in (self.tar, self.starts, self.lengths))
        return Shards(self.tars, *columns, self.names.take(indices))

    @classmethod
    def joined(cls, parts: list['Shards']) -> 'Shards':
        before = np.cumsum([0, *(len(part.tars) for part in parts)])
        return cls(
            [tar for part in parts for tar in part.tars],
            np.concatenate([part.tar + start for part, start in zip(parts, before, strict=False)]).astype(np.int32),
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            Names.joined([part.names for part in parts]),
        )

    def __add__(self, other: 'Shards') -> 'Shards':
        return Shards.joined([self, other])

    def digest(self, root: Path) -> str:
        """Of the shards' paths below the folder they lie in, and of the names and lengths of their images."""
        tars = [(tar.path.removeprefix(f'{folder_of(root)}/'), tar.size) for tar in self.tars]
        total = hashlib.sha256(repr(tars).encode(errors='surrogateescape'))
        for column in (self.tar, self.starts, self.lengths, self.names.ends, self.names.block):
            total.update(column)
        return total.hexdigest()


MOST_OPEN = 256  # shards, in each process: systems allow 1024 files or more
opened: dict[str, int] = {}  # descriptors, the one used last at the end


def descriptor(path: str) -> int:
    """The open file of a shard."""
    opened[path] = opened.pop(path, None) or os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if len(opened) > MOST_OPEN:
        forget(next(iter(opened)))
    return opened[path]


def forget(path: str) -> None:
    if path in opened:
        os.close(opened.pop(path))


def folder_of(data_path: Path) -> Path:
    """The folder that data lie in, which may be given as the name of a shard or of many: shards/{000..999}.tar."""
    return data_path if data_path.suffix.lower() != '.tar' or data_path.is_dir() else data_path.parent


class Pixels:
    """Images in memory, uint8 [N, H, W, 3]."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[str]:
        return map(self.name, range(len(self)))

    def name(self, index: int) -> str:
        return f'image {index}'

    def pixels(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return self.images[index]

    def take(self, indices: np.ndarray) -> 'Pixels':
        return Pixels(self.images[indices])

    def __add__(self, other: 'Pixels') -> 'Pixels':
        return Pixels(np.concatenate([self.images, other.images]))

    def digest(self, root: Path) -> str:
        return hashlib.sha256(self.images.tobytes()).hexdigest()


Store = Files | Shards | Pixels
