"""Where images lie: files, or pixels in memory. A data set asks its store for image i.

Each store has `len`, iteration over names, `name(i)`, which messages show, `pixels(i)` or else `open(i)`, a binary
file, `take(indices)`, a store of those images in that order, `+`, and `digest(root)`: what it holds, the same on
machines that have it below different roots.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

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
                self.block[np.repeat(starts[first : first + CHUNK] - before, lengths) + np.arange(sum(lengths))]
            )
        return Names(np.concatenate(parts), ends)

    def __add__(self, other: 'Names') -> 'Names':
        return Names(
            np.concatenate([self.block, other.block]), np.concatenate([self.ends, other.ends + len(self.block)])
        )


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
        return Files(self.paths + other.paths)

    def digest(self, root: Path) -> str:
        """Of the paths below the root: a second for a million, as none of the files is looked at."""
        total, prefix = hashlib.sha256(), f'{root}/'
        for path in self:
            total.update(b'\0' + os.fsencode(path.removeprefix(prefix)))
        return total.hexdigest()


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


Store = Files | Pixels
