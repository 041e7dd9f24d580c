"""What one process of a machine finds, the others map: ranks list no folder twice, loader processes copy no paths.

The arrays lie in memory without a name (memfd), which other processes of the same user open through /proc.
"""

import atexit
import fcntl
import hashlib
import io
import mmap
import multiprocessing
import os
import secrets
import struct
import tempfile
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np

from util import dist

LARGE = 2**16  # bytes of an array that is shared
COUNT = struct.Struct('<q')
LAUNCH = (  # what a launcher calls a launch
    *('MASTER_ADDR', 'MASTER_PORT', 'TORCHELASTIC_RUN_ID', 'TORCHELASTIC_RESTART_COUNT'),
    *('SLURM_JOB_ID', 'SLURM_STEP_ID', 'PMIX_NAMESPACE'),
)


class Shared(np.memmap):
    """An array that other processes map when it is pickled to them, as long as the one that made it lives."""

    @classmethod
    def of(cls, array: np.ndarray) -> 'Shared':
        name = secrets.token_hex(16)
        file = os.memfd_create(name)  # open to the end of the process
        with open(file, 'wb', closefd=False) as writer:
            writer.write(np.ascontiguousarray(array))
        return attached(f'/proc/{os.getpid()}/fd/{file}', name, array.dtype, array.shape)

    def __reduce__(self):
        whole = isinstance(self.base, mmap.mmap)
        return (attached, (str(self.filename), self.name, self.dtype, self.shape)) if whole else super().__reduce__()


def attached(file: str, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> Shared:
    """Raises OSError if the process that made it has ended."""
    if name not in os.readlink(file):
        raise FileNotFoundError(f'{file} is another file')
    array = Shared(file, dtype, 'r', shape=shape)
    array.name = name
    return array


class Sharing(ForkingPickler):
    def reducer_override(self, thing):
        large = type(thing) is np.ndarray and thing.nbytes > LARGE
        return Shared.of(thing).__reduce__() if large else NotImplemented


def in_shared_memory(thing) -> bytes:
    """Pickled, without its large arrays."""
    pickled = io.BytesIO()
    Sharing(pickled).dump(thing)
    return pickled.getvalue()


def once_a_node(key: tuple, make: Callable):
    """`make()`, which one rank of this machine calls for all. Each calls it where they cannot share: the same result.

    The first rank makes it under a lock; the file that is locked then tells the others where it lies, and is deleted by
    the last one. If the first fails or is gone, the next one makes it.
    """
    launch = [os.environ.get(name) for name in LAUNCH]
    ranks = dist.local_ranks()
    if not hasattr(os, 'memfd_create') or (ranks > 1 and not any(launch)):
        return make()
    if ranks == 1:
        forked = multiprocessing.get_context().get_start_method() == 'fork'
        return make() if forked else ForkingPickler.loads(in_shared_memory(make()))
    digest = hashlib.sha256(repr((key, launch, os.geteuid())).encode(errors='surrogateescape')).hexdigest()[:24]
    path = Path(tempfile.gettempdir()) / f'images-{digest}'
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), 'r+b')
    except OSError:  # a full disk, or another user's file
        return make()
    with file:
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            return make()
        fcntl.flock(file, fcntl.LOCK_EX)
        return made_or_found(file, path, ranks, make)


def made_or_found(file: io.BufferedRandom, path: Path, ranks: int, make: Callable):
    """What the locked file tells of, or what this rank makes, and tells it of."""
    content = file.read()
    count = COUNT.unpack_from(content)[0] + 1 if content else 1
    try:
        found = ForkingPickler.loads(content[COUNT.size :]) if content else None
    except OSError:  # who made it has ended
        found = None
    if found is None:
        atexit.register(path.unlink, missing_ok=True)  # where others never come
        try:
            content = COUNT.pack(1) + in_shared_memory(make())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        found = ForkingPickler.loads(content[COUNT.size :])
    file.seek(0)
    file.truncate()
    file.write(COUNT.pack(count) + content[COUNT.size :])
    file.flush()
    if count == ranks:
        path.unlink(missing_ok=True)
    return found
