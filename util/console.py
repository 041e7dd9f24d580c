"""What is printed. It never ends a run, and in a run rank 0's lines are kept in `console.txt` of the output folder.

A terminal can be lost, a pipe's reader can end, a disk that takes the output can be full. Then a line is lost.
"""

import contextlib
import os
import shutil
import sys
from collections import deque
from pathlib import Path

early: deque[str] = deque(maxlen=1000)  # lines from before there was a file
file: int | None = None  # descriptor of console.txt


def settle() -> None:
    """Make the standard streams such that printing works, or fails in `say`: as the first thing in a program."""
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        if getattr(sys, name) is None:  # closed (`>&-`): the next file opened would get its number, and what C prints
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, 'errors', '') == 'strict' and hasattr(stream, 'reconfigure'):
            with contextlib.suppress(ValueError):  # it was closed
                stream.reconfigure(errors='backslashreplace')


def say(text: str, *, error: bool = False, fleeting: bool | None = None) -> None:
    """Print a line. Not None: a line of progress, on a terminal in the place of the one before if that was fleeting."""
    keep(text)
    with contextlib.suppress(OSError, ValueError):  # ValueError: a closed stream, or letters that it does not have
        if fleeting is None or not sys.stdout.isatty():
            print(text, file=sys.stderr if error else sys.stdout, flush=True)
        else:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be overwritten
            end = '' if fleeting else '\n'
            print(f'\r\x1b[K{text[:width] if fleeting else text}', end=end, flush=True)


def flush() -> None:
    """Empty the streams' buffers. What cannot be written is dropped: Python would change the exit code for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def keep_in(path: Path, heading: str) -> None:
    """From now on keep what is said at the end of this file; first the heading, and what was said before."""
    global file
    if file is not None:
        os.close(file)
        file = None
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    said = [heading, *early]
    early.clear()
    for line in said:
        keep(line)


def keep(text: str) -> None:
    """Keep a line, in one write, or lose it."""
    if file is None:
        early.append(text)
        return
    with contextlib.suppress(OSError):
        os.write(file, f'{text}\n'.encode(errors='backslashreplace'))
