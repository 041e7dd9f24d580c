"""How a run fails: in one line, and with an exit code that says what kind of end it was."""

import difflib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence

from util import console

STOPPED = 75  # sysexits' "try again later": stopped on request with the state saved
MEANING = {
    0: 'done',
    1: 'a bug in the program; see its traceback',
    2: 'a mistake in arguments, data or files',
    3: 'diverged: too many steps in a row were not finite',
    4: 'none of the checkpoints can be read',
    5: 'a resource is used up or gone: disk, memory, shared memory, open files',
    6: 'a rank or a loader process was lost',
    STOPPED: 'stopped on request with the state saved; can be resumed',
    130: 'interrupted at once; what was saved before can be resumed',
}
PROGRAMS = {  # by the stage that a recipe, a run or a checkpoint is of
    'pretrain': 'main_pretrain.py',
    'finetune': 'main_finetune.py',
    'segment': 'scripts/finetune_segmentation.py',
    'detect': 'scripts/finetune_detection.py',
}


class RunError(Exception):
    """An end in one line: what is wrong, and what would be right. `code` is the exit code."""

    code = 1
    rank: int | None = None  # set if only this rank fails like this, or if its message differs from the others'
    common = False  # whether every rank is known to fail like this


class UserError(RunError):
    """A mistake in arguments, data or files."""

    code = 2


class DisagreementError(UserError):
    """Ranks that were started with different arguments, versions or data."""

    common = True


class CheckpointError(UserError):
    """A checkpoint file that is missing, damaged, unsafe, or of another architecture."""


class DamagedError(CheckpointError):
    """A checkpoint file whose content is not what was written."""


class DivergedError(RunError):
    """Too many steps in a row whose loss or gradient was not finite."""

    code = 3
    common = True


class NoCheckpointError(CheckpointError):
    """A run has checkpoints, but none of them can be read."""

    code = 4


class ResourceError(RunError):
    """Something that the machine has no more of: memory, shared memory, open files."""

    code = 5


class StorageError(ResourceError):
    """A disk that is full, read-only or gone."""


class LostError(RunError):
    """A rank or a loader process that has died, or does not answer."""

    code = 6


def one_line(text: object) -> str:
    """The text in one printable line: names of files may hold anything."""
    line = ' '.join(str(text).split())
    return ''.join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def program(stage: object) -> str:
    """The program of a stage; a file may name any."""
    return PROGRAMS.get(str(stage), f'main_{printable(stage, 80)}.py')


def printable(text: object, most: int | None = None) -> str:
    """Text from a file or a path, at most so many letters of it: what is no printable letter is escaped."""
    letters = str(text)[:most]
    return ''.join(c if c.isprintable() and c != '\\' else c.encode('unicode_escape').decode() for c in letters)


def listed(names: Sequence[object], most: int = 3, letters: int | None = 200) -> str:
    """'a, b, c, ...': the first names."""
    return ', '.join(printable(name, letters) for name in names[:most]) + (', ...' if len(names) > most else '')


def closest(word: str, known: Iterable[str]) -> str:
    """'; did you mean --epochs?' or nothing."""
    found = difflib.get_close_matches(word.partition('=')[0].lower(), list(known), n=3)
    return f'; did you mean {" or ".join(found)}?' if found else ''


def exit_code(error: BaseException | None) -> int:
    """The exit code of a process that ends with this exception."""
    match error:
        case None:
            return 0
        case RunError():
            return error.code
        case SystemExit():
            return error.code or 0
        case KeyboardInterrupt():
            return 130
    return 1


FIRST_S = 5  # how long other ranks wait for the first one of their machine to say the same
AT_THE_END: list[Callable[[int], None]] = []  # called with the exit code, after everything else (util/dist_faults.py)


def run_main(main: Callable[[], None], returns: bool = False) -> None:
    """Run an entry point: a `RunError` becomes one line on stderr, once on each machine, and its exit code.

    `returns`: after a good end, the process still has something to do before `AT_THE_END`.
    """
    console.settle()
    error = None
    try:
        main()
    except BaseException as raised:
        error = raised
    if isinstance(error, RunError):
        tell(error)
    elif isinstance(error, Exception):
        console.say(''.join(traceback.format_exception(error)).rstrip(), error=True)
    if error or not returns:
        for function in AT_THE_END:
            function(exit_code(error))
    console.flush()
    if error:
        raise SystemExit(exit_code(error)) from None


def tell(error: RunError) -> None:
    """The line of an error. What may be every rank's, the first one of a machine says; others only if it does not."""
    env, rank = os.environ, error.rank
    if rank is None and env.get('LOCAL_RANK', env.get('SLURM_LOCALID', '0')) != '0':
        if error.common:
            return
        time.sleep(FIRST_S)  # if the first one has ended with this, the launcher now ends this process too
        rank = env.get('RANK', env.get('SLURM_PROCID'))
    who = '' if rank is None else f'rank {rank}: '
    console.say(f'{os.path.basename(sys.argv[0])}: error: {who}{one_line(error)}', error=True)
