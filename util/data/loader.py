"""Loader processes: a bad sample, a process that died or is stuck: each ends the run in one line that names images."""

import atexit
import contextlib
import itertools
import signal
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import Process
from typing import Any

from torch.utils.data import DataLoader, default_collate

from util import dist, resources, signals
from util.errors import LostError, ResourceError, RunError, listed

NAMED = 3  # files in a message


class Loader(DataLoader):
    """A DataLoader whose iteration raises RunErrors as such, and LostError for a process that died or does not answer.

    The data set's `__getitems__` returns samples or a RunError; torch would put the traceback of an exception into its
    text. `name(index)` is what it calls an image. `patience_s` is how long loader processes may take for a batch.
    """

    def __init__(self, *args, patience_s: float, **kwargs):
        super().__init__(*args, collate_fn=collate, **kwargs)
        self.patience = partial(deadline, patience_s) if self.num_workers else contextlib.nullcontext

    def __iter__(self) -> Iterator[Any]:
        received, batches = 0, None
        try:
            batches = self.begin()
            while (batch := self.receive(batches)) is not None:
                received += 1
                if isinstance(batch, RunError):
                    raise of_this_rank(batch)
                yield batch
        except (LostError, RuntimeError, OSError, EOFError) as error:
            if self.num_workers and batches is None and isinstance(error, OSError):
                raise of_this_rank(ResourceError(resources.cannot_start(self.num_workers, error))) from error
            if not self.num_workers or resources.kind(error) or str(error).startswith('Caught '):  # by our own code
                raise
            dead = wait_for_dead(getattr(batches, '_workers', ()))
            why = how_it_died(dead[0]) if dead else str(error) or type(error).__name__
            raise of_this_rank(self.lost(received, why)) from None

    def begin(self) -> Iterator:
        """The batches of an epoch, without torch's handler of SIGCHLD: it raises wherever the main thread is just then.

        It may be in a step or a save, which must be finished first. Where batches are waited for, torch looks itself.
        """
        if not self.num_workers:
            return super().__iter__()
        atexit.unregister(signals.end_workers)
        atexit.register(signals.end_workers)  # or the process waits for them, who ignore requests to stop
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            with self.patience():  # it waits for the processes to begin
                return super().__iter__()
        finally:
            signal.signal(signal.SIGCHLD, handler)

    def receive(self, batches: Iterator) -> Any:
        """The next batch, or None at the end."""
        with self.patience():
            return next(batches, None)

    def lost(self, received: int, why: str) -> RunError:
        """What to say when a loader process is lost after so many batches. The others are ended, stuck ones too."""
        signals.end_workers()
        batch = next(itertools.islice(self.batch_sampler, received, None), [])
        files = listed([self.dataset.name(item[1]) for item in batch], NAMED, None)
        worker = received % self.num_workers  # they take turns
        kind = ResourceError if 'SIGBUS' in why else LostError
        return kind(f'{why}; loader worker {worker} was to bring the next {len(batch)} images: {files}')


def of_this_rank(error: RunError) -> RunError:
    error.rank = dist.rank() if dist.active() else None
    return error


def collate(samples: list | RunError) -> Any:
    """A batch. Its images stay in memory as they were decoded, [N, H, W, 3]: turning them here takes long."""
    if isinstance(samples, RunError):
        return samples
    if isinstance(samples[0], tuple) and isinstance(samples[0][1], dict):  # images of several sizes, and their objects
        return [list(part) for part in zip(*samples, strict=True)]
    if not isinstance(samples[0], tuple) or isinstance(samples[0][0], list):  # of --check_data; images of several sizes
        return default_collate(samples)
    imgs, *rest = default_collate([(image.movedim(0, -1), *rest) for image, *rest in samples])
    return [imgs.movedim(-1, 1), *rest]


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise LostError in what takes longer. Time in which this process was stopped (Ctrl-Z) does not count.

    By a signal, since torch's own timeout is only for the news of a batch. Then it fetches the batch's memory from the
    loader process, for which it waits without end. The signal comes every second: those of a pause come as one.
    """
    ticks, tick_s = 0, min(1, seconds / 10)

    def tick(number, frame):
        nonlocal ticks
        ticks += 1
        if ticks == round(seconds / tick_s):
            raise LostError(f'no loader process has answered for {seconds:g} seconds')

    handler = signal.signal(signal.SIGALRM, tick)
    timer = signal.setitimer(signal.ITIMER_REAL, tick_s, tick_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def wait_for_dead(workers: list[Process], seconds: float = 1) -> list[Process]:
    """Those that have ended, each of which should live; one may end a moment after its connection has broken."""
    end = time.monotonic() + seconds
    while not (dead := [worker for worker in workers if not worker.is_alive()]) and time.monotonic() < end:
        time.sleep(0.01)
    return dead


def how_it_died(worker: Process) -> str:
    code = worker.exitcode
    end = f'was killed by {signal.Signals(-code).name}' if code < 0 else f'exited with code {code}'
    return f'loader process {worker.pid} {end}{resources.why_killed(-code)}'
