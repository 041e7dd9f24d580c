"""Requests to stop: SIGTERM, Ctrl-C and others only set a flag, which the training loop reads between two steps.

SLURM, through submitit, sends SIGUSR2 before a time limit or a preemption: the job is to be queued again. What batch
systems send as a warning (`sbatch --signal=USR1@90`, a limit of CPU time) and a lost terminal (SIGHUP) ask to stop. A
signal that the program was started to ignore, as `nohup` does with SIGHUP, stays ignored.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

from util.errors import STOPPED

STOP, REQUEUE = 1, 2  # what is asked for (0: nothing); of several requests the largest counts
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)  # to stop
MEANING = dict.fromkeys(ASKING, STOP) | {signal.SIGUSR2: REQUEUE}
SUBMITITS = (signal.SIGUSR2, signal.SIGUSR1)  # it takes the first, unless SUBMITIT_PREEMPT_SIGNAL says otherwise
IGNORED = [number for number in MEANING if signal.getsignal(number) == signal.SIG_IGN]
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
    """Until `install` there is nothing to save: a request ends the process at once, as stopped.

    But for Ctrl-C, which is Python's own, and submitit's signal, which it obeys.
    """
    for number in ASKING:
        if number != signal.SIGINT and not (number in SUBMITITS and callable(signal.getsignal(number))):
            stand_in(number, stop_at_once)


def stand_in(number: int, handler: Callable[[int, object], None]) -> None:
    if number not in IGNORED:
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
        with contextlib.suppress(OSError):
            os.write(2, b'\nstopping after this step; once more Ctrl-C stops at once, saving nothing\n')
    submitits = number in SUBMITITS and callable(before.get(number))
    asked = max(asked, REQUEUE if submitits else MEANING[number])


def requested() -> int:
    """0, STOP or REQUEUE: what was asked of this process since `install`."""
    return asked


def requeue_handler() -> Callable[[int, object], None] | None:
    """submitit's handler of its signal, which queues the job again; None outside of submitit's jobs."""
    return next((before[number] for number in SUBMITITS if callable(before.get(number))), None)


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


def end_with_launcher(launcher: int) -> None:
    """Have Linux send this process SIGTERM when its launcher is killed, or is gone: nothing else would end it."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:
            signal.raise_signal(signal.SIGTERM)
