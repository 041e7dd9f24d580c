"""Runs the programs of a comparison: several at once, each one when those that it needs have ended well.

`job.json` in a job's folder says what it did, over all calls, and `job.txt` has what it printed. A job that is done is
not run again, and one that failed or was stopped is: a second call goes on. A failure ends only what needs it.

Programs are started in process groups of their own, so that a terminal's Ctrl-C is for this process alone, which asks
them to stop. Should it be killed, Linux asks them; until the last has ended they hold the lock of the whole folder.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from util import digests, resources, signals
from util.errors import STOPPED, StorageError, UserError, one_line, printable
from util.log import info
from util.run_folder import alive, now, prepare, read_json, wait_until

ROOT = Path(__file__).resolve().parents[2]
END_S = 30  # for programs to save in, once they are asked to stop
LOOK_S = 0.1  # from one look at the programs to the next
TOLD_EVERY = 60  # seconds between two lines on progress
TAIL = 2**16  # bytes at the end of `job.txt` in which the cause of a failure is sought
ERROR = re.compile(r'^[^\s:]+: error: (.+)$', re.MULTILINE)


class Job(NamedTuple):
    """A program to run."""

    name: str  # unique, and the folder below that of all jobs
    command: list[str]  # argv; a .py file is of the repository
    after: tuple[str, ...] = ()  # names of jobs that must have ended well; they come before this one in the list
    cost: float = 0.0  # FLOPs that it takes
    share: Callable[[], float] | None = None  # how much of it is done (0..1); None: unknown while it runs
    how: tuple[str, ...] = ()  # more words of the command, which may be others in the next call


class Outcome(NamedTuple):
    """What a job did in all calls together."""

    state: str  # 'done', 'failed', 'stopped', or 'not run': what it needs did not end well
    why: str = ''
    seconds: float = 0.0
    cpu_s: float = 0.0  # user and system, with the processes that it waited for
    peak_bytes: int = 0  # resident, of the largest process; Linux counts what this one had when it started it, too


def outcomes(jobs: list[Job], folder: Path) -> dict[str, Outcome]:
    """What earlier calls did, of the jobs that have the same command now, and which cannot be run for that."""
    found: dict[str, Outcome] = {}
    for job in jobs:
        record = read_json(folder / job.name / 'job.json')
        if record.get('argv') == job.command:
            found[job.name] = Outcome(**{key: record[key] for key in Outcome._fields if key in record})
        elif lacking := unmet(job, found):
            found[job.name] = lacking
    return found


def unmet(job: Job, ended: dict[str, Outcome]) -> Outcome | None:
    """Why a job cannot be run, or None."""
    for name in job.after:
        if name in ended and (outcome := ended[name]).state != 'done':
            cause = f'needs {name}, which {"failed" if outcome.state == "failed" else "was stopped"}'
            return Outcome('not run', outcome.why if outcome.state == 'not run' else cause)
    return None


def run(
    jobs: list[Job], folder: Path, at_once: int, environment: Callable[[int], dict[str, str]]
) -> dict[str, Outcome]:
    """Run what is not done yet, `at_once` programs at a time; `environment(slot)` is set for the one in that slot.

    Raises UserError if another process does so in this folder, and SystemExit when asked to stop, after the programs
    have saved. A second Ctrl-C kills them.
    """
    prepare(folder)
    with held(folder) as lock:
        queue = Queue(jobs, folder, at_once, environment, lock)
        if len(queue.ended) == len(jobs):
            info(f'nothing to run: {len(jobs)} of {len(jobs)} jobs are done')
            return queue.ended
        signals.install()
        try:
            queue.run()
            if signals.requested():
                info('stopped on request; the same command goes on where this one ended')
                raise SystemExit(STOPPED)
        finally:
            signals.restore()
    return queue.ended


@contextlib.contextmanager
def held(folder: Path) -> Iterator[TextIO]:
    """Lock a folder for this process and the programs that inherit the file. Raises UserError if others have it."""
    with open(folder / '.lock', 'a+', encoding='utf-8') as file:

        def lock() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                info(f'{folder} cannot be locked ({error.strerror}): make sure that no other comparison writes there')
            return True

        if not lock():
            file.seek(0)
            host, _, pid = file.read().partition(' ')
            if host == socket.gethostname() and pid.isdecimal() and not alive(int(pid)):
                info('a comparison in this folder was killed; waiting for its programs to save and end')
                wait_until(lock, END_S)
            if not lock():
                raise UserError(
                    f'another comparison writes to {folder} (host {host}, process {pid}); '
                    f'wait for it, stop it, or take another folder'
                )
        file.truncate(0)
        file.write(f'{socket.gethostname()} {os.getpid()}')
        file.flush()
        yield file


# --------------------------------------------------------------------------
# one program


@dataclass
class Running:
    """A job whose program runs."""

    job: Job
    slot: int
    process: subprocess.Popen
    log: Path
    printed: int  # bytes in the log from before
    first: float  # the share that was done before
    began: float

    @classmethod
    def start(cls, job: Job, slot: int, variables: dict[str, str], folder: Path, lock: TextIO) -> 'Running':
        """Raises OSError if there is no such program."""
        program, *words = [*job.command, *job.how]
        argv = [sys.executable, str(ROOT / program), *words] if program.endswith('.py') else [program, *words]
        first, launcher = job.share() if job.share else 0.0, os.getpid()

        def first_in_child() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until the program is loaded it would only be noted
            signals.end_with_launcher(launcher)

        with open(folder / 'job.txt', 'ab', buffering=0) as log:
            log.write(f'# {now()}: {printable(shlex.join([program, *words]))}\n'.encode())
            printed, streams = log.tell(), {'stdin': subprocess.DEVNULL, 'stdout': log, 'stderr': log}
            more = {'env': os.environ | variables, 'pass_fds': [lock.fileno()], 'preexec_fn': first_in_child}
            process = subprocess.Popen(argv, process_group=0, **streams, **more)
        return cls(job, slot, process, folder / 'job.txt', printed, first, time.monotonic())

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def outcome(self) -> Outcome | None:
        """What it did in this call, once it has ended."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):  # what it left behind, as a rule nothing
            os.killpg(pid, signal.SIGKILL)
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        stopped = code and (signals.requested() or code in (STOPPED, 130) or -code in signals.ASKING)
        state = 'stopped' if stopped else 'failed' if code else 'done'
        why = self.why(code) if state == 'failed' else ''
        return Outcome(state, why, self.seconds(), usage.ru_utime + usage.ru_stime, resources.peak_memory(usage))

    def why(self, code: int) -> str:
        """Why it failed: in its own line, or else how it ended."""
        if code < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f'died by {names.get(-code, f"signal {-code}")}{resources.why_killed(-code)}'
        with open(self.log, 'rb') as log:
            log.seek(max(self.printed, log.seek(0, os.SEEK_END) - TAIL))
            text = log.read().decode(errors='replace').strip()
        if lines := ERROR.findall(text):
            return one_line(lines[-1])
        return f'exit code {code}' + (f', after {one_line(text.splitlines()[-1])}' if text else '')


# --------------------------------------------------------------------------
# all of them


class Queue:
    """The jobs of a call: those that have ended, those that run, each in a slot, and those that wait."""

    def __init__(self, jobs: list[Job], folder: Path, at_once: int, environment: Callable, lock: TextIO):
        self.jobs, self.folder, self.at_once, self.environment, self.lock = jobs, folder, at_once, environment, lock
        self.ended = {name: outcome for name, outcome in outcomes(jobs, folder).items() if outcome.state == 'done'}
        self.running: dict[str, Running] = {}
        self.free = [*range(at_once)]  # slots
        self.cost, self.seconds = 0.0, 0.0  # of what was done in this call
        self.told = time.monotonic()

    def run(self) -> None:
        """Until all have ended, or a request to stop."""
        try:
            while len(self.ended) < len(self.jobs) and not signals.requested():
                self.start()
                time.sleep(LOOK_S)
                self.collect()
                if time.monotonic() - self.told >= TOLD_EVERY:
                    self.tell(f'{", ".join(self.running)} running')
        finally:
            self.stop()

    def start(self) -> None:
        """Fill the free slots with the first jobs that can be run."""
        for job in self.jobs:
            if not self.free or signals.requested():
                return
            if job.name in self.ended or job.name in self.running:
                continue
            if lacking := unmet(job, self.ended):
                self.ended[job.name] = lacking
            elif all(name in self.ended for name in job.after):
                slot, folder = min(self.free), self.folder / job.name
                prepare(folder)
                try:
                    self.running[job.name] = Running.start(job, slot, self.environment(slot), folder, self.lock)
                    self.free.remove(slot)
                except OSError as error:
                    self.end(job, Outcome('failed', f'cannot be started: {error}'))

    def collect(self) -> bool:
        """Take what has ended out of its slot; returns whether nothing runs."""
        for child in [*self.running.values()]:
            if outcome := child.outcome():
                del self.running[child.job.name]
                self.free.append(child.slot)
                if outcome.state == 'done':
                    self.cost += child.job.cost * (1 - child.first)
                    self.seconds += outcome.seconds
                self.end(child.job, outcome)
        return not self.running

    def end(self, job: Job, outcome: Outcome) -> None:
        """Keep what a job did, and tell. Raises StorageError."""
        file = self.folder / job.name / 'job.json'
        before = {'seconds': 0.0, 'cpu_s': 0.0, 'peak_bytes': 0} | read_json(file)
        total = self.ended[job.name] = outcome._replace(
            seconds=outcome.seconds + before['seconds'],
            cpu_s=outcome.cpu_s + before['cpu_s'],
            peak_bytes=max(outcome.peak_bytes, before['peak_bytes']),
        )
        try:
            digests.replace(file, (json.dumps({'argv': job.command, **total._asdict()}, indent=2) + '\n').encode())
        except OSError as error:
            raise StorageError(f'cannot write {file}: {error.strerror}') from error
        how = {'done': 'done in', 'failed': 'FAILED after', 'stopped': 'stopped after'}[total.state]
        self.tell(f'{job.name} {how} {spoken(total.seconds)}' + (f': {total.why}' if total.why else ''))

    def tell(self, text: str) -> None:
        self.told = time.monotonic()
        left = '' if signals.requested() or len(self.ended) == len(self.jobs) else f'; {self.time_left()}'
        info(f'{len(self.ended)} of {len(self.jobs)}: {text}{left}')

    def time_left(self) -> str:
        """By the speed of this call's jobs: of all that is left in all slots, or of the longest chain in one."""
        cost, seconds, left, ends = self.cost, self.seconds, {}, {}
        for job in self.jobs:
            share = job.share() if job.share and job.name not in self.ended else 0.0
            left[job.name] = 0.0 if job.name in self.ended else job.cost * (1 - share)
            if job.share and job.name in self.running:
                cost += job.cost * (share - self.running[job.name].first)
                seconds += self.running[job.name].seconds()
        if not (cost > 0 and seconds):
            return 'time left: not known yet'
        for job in self.jobs:
            if not job.share and job.name in self.running:
                left[job.name] = max(0.0, job.cost - self.running[job.name].seconds() * cost / seconds)
            ends[job.name] = left[job.name] + max((ends[name] for name in job.after), default=0.0)
        return f'about {spoken(max(sum(left.values()) / self.at_once, *ends.values()) * seconds / cost)} left'

    def stop(self) -> None:
        """Ask what runs to stop; what has not ended in time, or at a second Ctrl-C, is killed with its processes."""
        for child in self.running.values():  # not Popen's methods, which would collect it without its usage
            os.kill(child.process.pid, signal.SIGTERM)
        try:
            wait_until(self.collect, END_S)
        finally:
            for child in self.running.values():
                os.kill(child.process.pid, signal.SIGKILL)
            wait_until(self.collect, END_S)


def spoken(seconds: float) -> str:
    """'5 s', '45 min', '1.5 h'"""
    size, unit = (1, 's') if seconds < 60 else (60, 'min') if seconds < 3600 else (3600, 'h')
    number = seconds / size
    return f'{number:.{int(size > 1 and number < 10)}f} {unit}'
