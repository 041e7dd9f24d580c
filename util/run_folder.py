"""A run's hold on its output folder: one writer at a time, `status.json`, and a sign of life of every rank.

`.lock` is held by rank 0 until the run ends, whatever ends it. `console.txt` has what was printed. `status.json` says
how the run goes or ended, since launchers such as torchrun replace exit codes. `.ranks/<rank>.json` is the position of
a rank, a second old at most or from before its latest step: when a rank is lost, the others read there which one, and
where it was. They name it and end; to end a rank that hangs is the launcher's work.
"""

import contextlib
import fcntl
import json
import math
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from util import console, digests, dist_faults
from util.dist import Place
from util.errors import MEANING, STOPPED, StorageError, UserError, printable
from util.log import info

BEAT_S = 1  # from one sign of life to the next, in training: the folder may be on a network
SIGN_BYTES = 1024  # a sign of life is written in place, so all of them have one length
BUSY = ('starting', 'running')
PATIENCE_S = 5  # for other ranks to write that they have noticed a lost one


def prepare(folder: Path) -> None:
    """Make a folder. Raises StorageError if nothing can be written there, UserError if it is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b'0')
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f'cannot write to the output folder {folder}: it is, or lies in, a file') from error
    except OSError as error:
        raise StorageError(f'cannot write to the output folder {folder}: {error.strerror}') from error


class RunFolder:
    """The output folder of a run, as one of its ranks holds it."""

    def __init__(self, folder: Path, place: Place, unit: str = 'epoch'):
        self.folder, self.place, self.unit = folder, place, unit
        self.epoch = self.step = 0
        self.beaten = -math.inf  # when it last wrote so in training
        # which run this is: rank 0, which has the lock, tells the others when they meet. They write nothing before
        self.run = f'{time.time_ns():x}' if place.rank == 0 else ''
        self.identity = {'host': socket.gethostname(), 'pid': os.getpid()}
        self.identity |= {'job': os.environ['SLURM_JOB_ID']} if 'SLURM_JOB_ID' in os.environ else {}
        self.lockable = True
        prepare(folder)
        self.lock = self.take_lock() if place.rank == 0 else None
        if self.lock:
            words = printable(shlex.join(sys.argv), 2000)
            console.keep_in(folder / 'console.txt', f'# {now()}, {self.who()}: {words}')
        prepare(folder / '.ranks')
        self.sign = open(self.sign_of(place.rank), 'w+b', buffering=0)  # noqa: SIM115
        self.beat(state='starting')

    # --------------------------------------------------------------------------
    # one writer

    def take_lock(self):
        """Lock the folder; the system unlocks it when this process ends. Raises UserError if another process has it."""
        file = open(self.folder / '.lock', 'a+', encoding='utf-8')  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise UserError(
                f'another run writes to {self.folder} ({file.read().strip()}); stop it, or take another --output_dir'
            ) from error
        except OSError as error:
            info(f'{self.folder} cannot be locked ({error.strerror}): make sure that no other run writes there')
            self.lockable = False
        file.truncate(0)
        file.write(self.who())
        file.flush()
        return file

    def who(self) -> str:
        return ', '.join(f'{key} {value}' for key, value in self.identity.items())

    def is_ours(self) -> bool:
        """Whether the folder still is this run's: another one may have it once the lock was removed or replaced."""
        if not self.lock:
            return not self.run or read_json(self.folder / 'status.json').get('run', self.run) == self.run
        try:
            path, held = os.stat(self.folder / '.lock'), os.fstat(self.lock.fileno())
        except FileNotFoundError:
            return not self.lockable or not self.folder.is_dir()  # without its folder, saving fails and says so
        except OSError:
            return True
        return not self.lockable or os.path.samestat(path, held)

    def check_lock(self) -> None:
        """Raise UserError on rank 0 if the folder is not this run's any more: before anything is written."""
        if self.lock and not self.is_ours():
            raise UserError(
                f'{self.folder}/.lock was removed or replaced while this run had it, so that another one may write '
                f'there; this one ends without writing anything more. To resume: --resume auto, once none runs there'
            )

    # --------------------------------------------------------------------------
    # status

    def write_status(self, state: str, code: int | None = None, message: str = '') -> None:
        """Write `status.json`; if there is no room for a new file, into the old one."""
        status = {
            'run': self.run,
            'state': state,
            'exit_code': code,
            'meaning': MEANING.get(code, ''),
            'message': message,
            'epoch': self.epoch,
            'step': self.step,
            'rank': self.place.rank,
            'world_size': self.place.world_size,
            **self.identity,
            'time': now(),
        }
        content = (json.dumps(status, indent=2) + '\n').encode()
        file = self.folder / 'status.json'
        try:
            digests.replace(file, content)
        except OSError:
            with contextlib.suppress(OSError):
                file.write_bytes(content)

    def has_failed(self) -> bool:
        """Whether a rank of this run has written so already: the first one tells the cause."""
        status = read_json(self.folder / 'status.json')
        return status.get('state') == 'failed' and status.get('run') == self.run

    def close(self, code: int, message: str, noticed: bool = False) -> None:
        """Write how the run ended, unless another rank has done so first, and unlock the folder.

        `noticed`: it ends because another rank was lost.
        """
        if self.sign.closed:
            return
        state = {0: 'done', STOPPED: 'stopped'}.get(code, 'failed')
        if self.is_ours():
            if not self.has_failed() and (self.place.rank == 0 or (code and self.run)):
                self.write_status(state, code, message if state == 'failed' else '')
            self.beat(state='noticed' if noticed else state, message=message)
        self.sign.close()
        if self.lock:
            self.lock.close()

    # --------------------------------------------------------------------------
    # signs of life

    def sign_of(self, rank: int) -> Path:
        return self.folder / '.ranks' / f'{rank}.json'

    def beat(
        self, epoch: int | None = None, step: int | None = None, state: str = 'running', message: str = ''
    ) -> None:
        """Write that this rank has done `step` steps of `epoch`, in training once a second.

        A short write; if it fails, nothing else does.
        """
        if epoch is not None:
            self.epoch, self.step = epoch, step
        if state == 'running':
            if (moment := time.monotonic()) - self.beaten < BEAT_S:
                return
            self.beaten = moment
        sign = {'state': state, 'epoch': self.epoch, 'step': self.step, **self.identity, 'message': message[:150]}
        with contextlib.suppress(OSError):
            content = json.dumps(sign, ensure_ascii=False).encode(errors='backslashreplace')
            os.pwrite(self.sign.fileno(), content.ljust(SIGN_BYTES), 0)
            if state != 'running':  # other hosts are to see this within seconds
                os.fsync(self.sign.fileno())

    def lost(self, error: BaseException) -> str:
        """Which ranks have failed, died or do not answer, after a collective has failed.

        Every rank that lives notices, too, and writes so within seconds: one that does not is a lost rank.
        """
        self.beat(state='noticed')
        dist_faults.hang_up()
        others = [rank for rank in range(self.place.world_size) if rank != self.place.rank]
        wait_until(lambda: not any(self.may_answer(self.read_sign(rank)) for rank in others), PATIENCE_S)
        signs = {rank: self.read_sign(rank) for rank in others}
        if failed := [rank for rank in others if signs[rank]['state'] == 'failed']:
            return f'rank {failed[0]} has failed: {signs[failed[0]]["message"]}'
        silent = [rank for rank in others if signs[rank]['state'] in BUSY]
        return '; '.join(self.describe(rank, signs[rank]) for rank in silent) or f'a connection broke: {error}'

    def read_sign(self, rank: int) -> dict:
        unknown = {'state': 'starting', 'host': 'unknown', 'pid': 0, 'epoch': 0, 'step': 0}
        return read_json(self.sign_of(rank)) or unknown

    def has_died(self, sign: dict) -> bool:
        """Whether a rank's process is known to have ended; of other machines nothing is known."""
        return sign['host'] == self.identity['host'] and not alive(sign['pid'])

    def may_answer(self, sign: dict) -> bool:
        return sign['state'] in BUSY and not self.has_died(sign)

    def describe(self, rank: int, sign: dict) -> str:
        """What is known of a lost rank, and what to do if its process is still there."""
        if not sign['pid']:
            return f'rank {rank} has left no sign of life'
        who = f'rank {rank} (host {sign["host"]}, process {sign["pid"]})'
        position = f'its last sign was after step {sign["step"]} of {self.unit} {sign["epoch"]}'
        if self.has_died(sign):
            return f'{who} has died; {position}'
        return f'{who} does not answer; {position}; kill it if the launcher does not'


class NoFolder:
    """What a dry run has in place of a `RunFolder`: it leaves nothing, and of a lost rank nothing is known."""

    run = ''
    epoch = step = 0

    def __init__(self, place: Place):
        self.place = place

    def write_status(self, state: str) -> None:
        pass

    def close(self, code: int, message: str, noticed: bool = False) -> None:
        pass

    def lost(self, error: BaseException) -> str:
        return f'a connection broke: {error}'


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec='seconds')


def alive(pid: int) -> bool:
    """Whether a process of this machine runs, or hangs: neither gone nor waiting to be collected by its parent."""
    if sys.platform != 'linux':  # no /proc: one that waits to be collected seems to run
        with contextlib.suppress(PermissionError):  # somebody else's
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return False
        return True
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
