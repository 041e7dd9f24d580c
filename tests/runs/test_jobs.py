"""The programs of a comparison: their order, their ends, and what stops them."""

import errno
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from util import digests, signals
from util.comparison import jobs
from util.comparison.jobs import Job, Outcome, outcomes
from util.errors import STOPPED, StorageError, UserError
from util.run_folder import alive, wait_until

SAVES = 'import signal, sys; signal.signal(15, lambda *_: (time.sleep({}), print("saved"), sys.exit(75)))'
DEAF = 'import signal; signal.signal(15, signal.SIG_IGN)'
WAITS = 'open("pid", "w").write(str(os.getpid())); os.rename("pid", "{}.pid"); time.sleep(60)'


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """The programs run in a folder of the test."""
    monkeypatch.setattr(jobs, 'LOOK_S', 0.01)
    monkeypatch.setattr(jobs, 'ROOT', tmp_path)


def python(*code: str) -> list[str]:
    return [sys.executable, '-I', '-S', '-c', '\n'.join(['import os, time', *code])]


def run(tasks: list[Job], folder: Path, at_once: int = 2) -> dict[str, Outcome]:
    return jobs.run(tasks, folder / 'runs', at_once, lambda slot: {'SLOT': str(slot)})


def states(found: dict[str, Outcome]) -> dict[str, str]:
    return {name: outcome.state for name, outcome in found.items()}


def test_slots(tmp_path):
    """Two at once, each alone in its slot, in the order of the list; and what needs others runs after them."""
    note = 'print(os.environ["SLOT"], {!r}, file=open("order", "a"), flush=True)'
    work = [note.format('begins'), 'time.sleep(0.1)', note.format('ends')]
    meet = ['open(str(os.getpid()) + ".here", "w")', 'while sum(n.endswith(".here") for n in os.listdir()) < 2: pass']
    first = [Job(f'first/{i}', python(*meet, *work)) for i in range(2)]
    tasks = [*first, Job('last', python(*work), after=('first/0', 'middle')), Job('middle', python(*work))]
    with pytest.raises(KeyError):  # needed jobs come first
        jobs.Queue(tasks, tmp_path, 2, dict, None).left()
