"""What gloo's faults force. Each part can go when its fault is mended.

Seen with torch 2.6, 2.11 and 2.15, the first with 2.14 too.

1. A rank does not notice a lost one while it waits for a third: gloo's connections are pairs, and the one to the third
   still stands. Of four ranks, others would be named beside the lost one. `hang_up` breaks all connections. Beside
   NCCL too, where the hosts agree over gloo.
   Without it `test_only_the_lost_one_of_four_is_named` in tests/runs/test_ranks.py fails every time.
2. The freeing of DistributedDataParallel joins gloo's threads with Python's lock held, for which one of them may be
   waiting: the process may never end. `outlive` keeps the model for ever.
3. The threads that are left may then abort a process that ends as usual. `end_process` does what Python does at its
   end, and leaves at once.
   2 and 3 are rare: without them eight runs of two ranks ended well under torch 2.14. Repeat tests/faults/test_kills.py
   (KILLS=200) before they go.
"""

import atexit
import contextlib
import ctypes
import os
import socket
import stat
import sys

from torch import nn

from util import console
from util.errors import AT_THE_END


def hang_up() -> None:
    """Break this process's connections, so that ranks that wait for it notice, and not only those of the lost one."""
    for descriptor in map(int, os.listdir('/proc/self/fd' if sys.platform == 'linux' else '/dev/fd')):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        connection.getpeername()  # fails for one that listens, which gloo needs to the end
                        connection.shutdown(socket.SHUT_RDWR)


def outlive(model: nn.Module) -> None:
    """Never free this model, and let `run_main` end the process without freeing anything. On CPU alone."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(model))
    AT_THE_END.append(end_process)


def end_process(code: int) -> None:
    """What Python does at its end, but for the freeing of what is left."""
    atexit.unregister(end_process)  # which may be one of them
    atexit._run_exitfuncs()
    console.flush()
    os._exit(code)
