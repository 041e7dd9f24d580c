"""How a run fails: in one line, and with an exit code that says what kind of end it was."""

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterable

if sys.platform == 'win32':  # every program comes by here before it imports what Windows lacks
    print('Windows is not supported: use WSL2, where this runs as on Linux', file=sys.stderr)
    raise SystemExit(2)

STOPPED = 75  # sysexits' "try again later": stopped on request with the state saved
MEANING = {
    0: 'done',
    1: 'a bug in the program; see its traceback',
    2: 'a mistake in arguments, data or files',
    3: 'diverged: too many steps in a row were not finite',
    4: 'none of the checkpoints can be read',
    5: 'storage: full, read-only, or gone',
    6: 'a rank or a loader process was lost',
    STOPPED: 'stopped on request with the state saved; can be resumed',
    130: 'interrupted at once; what was saved before can be resumed',
}


class RunError(Exception):
    """An end in one line: what is wrong, and what would be right. `code` is the exit code."""

    code = 1
    rank: int | None = None  # set if only this rank fails like this, or if its message differs from the others'


class UserError(RunError):
    """A mistake in arguments, data or files."""

    code = 2


class CheckpointError(UserError):
    """A checkpoint file that is missing, damaged, unsafe, or of another architecture."""


class DamagedError(CheckpointError):
    """A checkpoint file whose content is not what was written."""


class DivergedError(RunError):
    """Too many steps in a row whose loss or gradient was not finite."""

    code = 3


class NoCheckpointError(CheckpointError):
    """A run has checkpoints, but none of them can be read."""

    code = 4


class StorageError(RunError):
    """A disk that is full, read-only or gone."""

    code = 5


class LostError(RunError):
    """A rank or a loader process that has died, or does not answer."""

    code = 6


def one_line(text: object) -> str:
    """The text in one printable line: names of files may hold anything."""
    line = ' '.join(str(text).split())
    return ''.join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def printable(text: object, most: int | None = None) -> str:
    """Text from a file or a path, at most so many letters of it: what is no printable letter is escaped."""
    letters = str(text)[:most]
    return ''.join(c if c.isprintable() and c != '\\' else c.encode('unicode_escape').decode() for c in letters)


def closest(word: str, known: Iterable[str]) -> str:
    """'; did you mean --epochs?' or nothing."""
    found = difflib.get_close_matches(word.partition('=')[0], list(known), n=3)
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


AT_THE_END: list[Callable[[int], None]] = []  # called with the exit code, after everything else (util/dist_faults.py)


def run_main(main: Callable[[], None], returns: bool = False) -> None:
    """Run an entry point: a `RunError` becomes one line on stderr, once on each machine, and its exit code.

    `returns`: after a good end, the process still has something to do before `AT_THE_END`.
    """
    error = None
    try:
        main()
    except BaseException as raised:
        error = raised
    if isinstance(error, RunError):
        if error.rank is not None or os.environ.get('LOCAL_RANK', os.environ.get('SLURM_LOCALID', '0')) == '0':
            who = '' if error.rank is None else f'rank {error.rank}: '
            print(f'{os.path.basename(sys.argv[0])}: error: {who}{one_line(error)}', file=sys.stderr)
    elif isinstance(error, Exception):
        traceback.print_exception(error)
    if error or not returns:
        for function in AT_THE_END:
            function(exit_code(error))
    if error:
        raise SystemExit(exit_code(error)) from None
