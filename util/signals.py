"""Requests to stop: SIGTERM, SIGUSR2 and Ctrl-C only set a flag, which the training loop reads between two steps.

SLURM, through submitit, sends SIGUSR2 before a time limit or a preemption: the job is to be queued again.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

from util.errors import STOPPED

STOP, REQUEUE = 1, 2  # what is asked for (0: nothing); of several requests the largest counts
MEANING = {signal.SIGTERM: STOP, signal.SIGINT: STOP, signal.SIGUSR2: REQUEUE}
PR_SET_PDEATHSIG = 1  # linux/prctl.h

asked = 0
before: dict[int, object] = {}  # the handlers that ours replace


def install() -> None:
    """From now on a signal is a request."""
    global asked
    asked = 0
    for number in MEANING:
        stand_in(number, note)


def install_early() -> None:
    """Until `install` there is nothing to save: SIGTERM ends the process at once, as stopped."""
    stand_in(signal.SIGTERM, stop_at_once)


def stand_in(number: int, handler: Callable[[int, object], None]) -> None:
    previous = signal.signal(number, handler)
    before.setdefault(number, previous)


def restore() -> None:
    """Put the handlers from before back; not over `ignore`, after which the process ends."""
    while before:
        number, handler = before.popitem()
        if signal.getsignal(number) in (note, stop_at_once):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def stop_at_once(number: int, frame) -> None:
    raise SystemExit(STOPPED)


def note(number: int, frame) -> None:
    """The handler. A second Ctrl-C does not wait for the step to end."""
    global asked
    if number == signal.SIGINT:
        if asked:
            raise KeyboardInterrupt
        os.write(2, b'\nstopping after this step; once more Ctrl-C stops at once, saving nothing\n')
    asked = max(asked, MEANING[number])


def requested() -> int:
    """0, STOP or REQUEUE: what was asked of this process since `install`."""
    return asked


def requeue_handler() -> Callable[[int, object], None] | None:
    """submitit's handler of SIGUSR2, which queues the job again; None outside of submitit's jobs."""
    handler = before.get(signal.SIGUSR2)
    return handler if callable(handler) else None


def ignore(worker_id: int = 0) -> None:
    """Ignore requests to stop. In loader processes: launchers signal whole groups, and batches are still needed.

    And in a process that has saved and ends: a second signal would kill it while Python shuts down.
    """
    for number in MEANING:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the loader processes: they ignore the SIGTERM of multiprocessing, which would wait for them without end."""
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


def end_with_parent() -> None:
    """Have Linux send this process SIGTERM when its launcher is killed: nothing else would end it."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
