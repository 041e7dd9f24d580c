"""Loader processes: what ails them is said in one line, be it a sample, a process that died, or one that is stuck."""

import atexit
import contextlib
import itertools
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, default_collate

from util import dist, signals
from util.data.images import printable
from util.errors import LostError, RunError

NAMED = 3  # files in a message

torchs_handler = None  # of SIGCHLD
waiting = False  # for a batch
lost: LostError | None = None  # what that handler reported while nobody waited


class Loader(DataLoader):
    """A DataLoader whose iteration raises RunErrors as such, and LostError for a worker that died or does not answer.

    The data set's `__getitems__` gives samples, or the RunError that kept it from them: an exception, torch would raise
    again with a traceback for its text. `name(index)` is what it calls an image. `patience_s` is how long workers may
    take for a batch.
    """

    def __init__(self, *args, patience_s: float, **kwargs):
        super().__init__(*args, collate_fn=collate, **kwargs)
        self.patience = partial(deadline, patience_s) if self.num_workers else contextlib.nullcontext

    def __iter__(self) -> Iterator[Any]:
        received = 0
        try:
            with self.patience():  # it waits for the workers to begin an epoch
                batches = super().__iter__()
            watch_workers()
            while (batch := self.wait_for(batches)) is not None:
                received += 1
                if isinstance(batch, RunError):
                    raise batch
                yield batch
        except RunError as error:
            own = self.lost(received, error) if isinstance(error, LostError) else error
            own.rank = dist.rank() if dist.active() else None
            raise own from None
        except (RuntimeError, OSError, EOFError) as error:
            if not self.num_workers or str(error).startswith('Caught '):  # raised by our own code, in a worker
                raise
            raise self.lost(received, error) from None

    def wait_for(self, batches: Iterator) -> Any:
        """The next batch, or None at the end. Raises LostError if a worker has died, or takes too long."""
        global waiting, lost
        waiting = True
        try:
            if lost:
                raise lost
            with self.patience():
                return next(batches, None)
        finally:
            waiting, lost = False, None

    def lost(self, received: int, error: Exception) -> LostError:
        """What to say when a worker is lost after so many batches. The others are ended, stuck ones too."""
        signals.end_workers()
        why = error.__cause__ if isinstance(error.__cause__, LostError) else error
        if isinstance(why, OSError | EOFError):  # a broken connection, which says nothing, or not what it was
            why = 'a loader process exited unexpectedly'
        batch = next(itertools.islice(self.batch_sampler, received, None), [])
        files = ', '.join(printable(self.dataset.name(item[1])) for item in batch[:NAMED])
        worker = received % self.num_workers  # they take turns
        more = ', ...' if len(batch) > NAMED else ''
        return LostError(f'{why}; loader worker {worker} was to bring the next {len(batch)} images: {files}{more}')


def collate(samples: list | RunError) -> Any:
    return samples if isinstance(samples, RunError) else default_collate(samples)


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise LostError in what takes longer.

    By a signal, since torch's own timeout is only for the news of a batch. Then it fetches the batch's memory from the
    worker, for which it waits without end.
    """

    def expire(number, frame):
        raise LostError(f'no loader process has answered for {seconds:g} seconds')

    handler = signal.signal(signal.SIGALRM, expire)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def watch_workers() -> None:
    """Stand in for torch's handler of SIGCHLD, which would raise wherever the main thread is just then.

    And have the workers killed when this process ends: it would wait for them, who are deaf to requests to stop.
    """
    global torchs_handler
    atexit.unregister(signals.end_workers)
    atexit.register(signals.end_workers)
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and handler is not on_ended_child:
        torchs_handler = handler
        signal.signal(signal.SIGCHLD, on_ended_child)


def on_ended_child(number: int, frame) -> None:
    """Torch's handler raises for a worker that crashed. A step or a save that goes on is finished first."""
    global lost
    try:
        torchs_handler(number, frame)
    except RuntimeError as error:
        lost = LostError(str(error).partition('. ')[0].rstrip('. '))
        if waiting:
            raise lost from None
