"""What a process can run out of: memory, a GPU's, shared memory, open files. One line says which, and what to change.

`program` wraps the main of a program, and `Run` names what happens in a run: both ask `named`.
"""

import argparse
import contextlib
import errno
import functools
import math
import mmap
import multiprocessing.util
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from util import dist
from util.errors import LostError, ResourceError, RunError, UserError

with contextlib.suppress(ImportError):  # Windows
    import resource

PREFETCH = 4  # batches that each loader process keeps ready
SHM = Path('/dev/shm')  # where Linux keeps shared memory, through which loader processes hand over their batches
MOST_FILES = 65536  # enough for any loader; some hard limits are a billion, and there are programs that count to it
LONGEST_SOCKET = 107 if sys.platform == 'linux' else 103  # bytes of a socket's path: sun_path in sys/un.h
SOCKET = 20  # bytes that multiprocessing puts behind its folder
PAGE = mmap.PAGESIZE
PROBE = 2**26  # bytes that a process must be able to take, if it was an image that asked for too much

ERRNO = {errno.ENOMEM: 'memory', errno.EMFILE: 'open files', errno.ENFILE: 'open files'}
WORDS = {  # of torch, CUDA and libraries, whose exceptions have no class for it; the first that fits
    'open files': r'Too many open files|items of ancdata|\[Errno (23|24)\]',
    'shared memory': r'(unable to|could not) [^<\n]*</?torch_\w+>(?!.*Cannot allocate)',
    'GPU memory': r'(CUDA|Cuda|HIP)\b.*out of memory|CU(BLAS|DNN)\w*_ALLOC\w*_FAILED',
    'memory': (
        r"can't allocate memory|Cannot allocate memory|not enough memory|bad_alloc|\[Errno 12\]|"
        r"can't start new thread|failed to create thread|^Resource temporarily unavailable$"
    ),
}
DOING = {  # functions in which it may happen; the innermost counts
    'train_one_epoch': 'a training step',
    'timed_steps': 'a training step',
    'measured_costs': 'a training step',
    'evaluate': 'the evaluation',
    'Pictures.__init__': 'drawing pictures',
    'Pictures.draw': 'drawing pictures',
    'create_model': 'making the model',
    'create_classifier': 'making the model',
    'create_segmenter': 'making the model',
    'create_detector': 'making the model',
    'predict': 'testing an image',
    'check_forward': 'trying the model',
    'save': 'writing a checkpoint',
}
BATCHES = ('a training step', 'the evaluation')


def program(main: Callable[[argparse.Namespace], Any]) -> Callable[[argparse.Namespace], Any]:
    """A program's main that gets what its process may have, and ends in one line where that is used up."""

    @functools.wraps(main)
    def run(args: argparse.Namespace) -> Any:
        raise_open_files()
        if getattr(args, 'num_workers', 0):
            check_sockets()
        try:
            return main(args)
        except Exception as error:
            if (line := named(error, args)) is error:
                if isinstance(error, RunError) or not dist.is_lost(error):
                    raise
                line = LostError('another rank has ended')
            line.rank = dist.rank() if dist.active() else None
            raise line from error

    return run


# --------------------------------------------------------------------------
# what an exception means


def kind(error: BaseException) -> str:
    """What is used up; '' if an exception says nothing of that."""
    if isinstance(error, OSError) and error.errno:
        return ERRNO.get(error.errno, '')
    if isinstance(error, MemoryError):
        return 'memory'
    return next((name for name, words in WORDS.items() if re.search(words, str(error))), '')


def named(error: BaseException, args: argparse.Namespace) -> BaseException:
    """A ResourceError for an exception that means, or whose cause means, that something is used up; or itself."""
    cause = error
    while isinstance(cause, RunError):
        cause = cause.__cause__
    if type(error) is ResourceError or not cause or not (what := kind(cause)):
        return error
    where = doing(error, cause)
    before = f'{error}; ' if isinstance(error, RunError) else ''
    at = f' in {where}' if where and what.endswith('memory') else ''
    at += f' at --batch_size {args.batch_size}' if at and where in BATCHES else ''
    told = [f'out of {what}{at}', numbers(what, cause, args)]
    return ResourceError(before + '; '.join(filter(None, [*told, to_change(what, where, args)])))


def doing(*errors: BaseException) -> str:
    """What the program was at; '' if that does not matter."""
    if 'DataLoader worker process' in str(errors[-1]):
        return 'a loader process'
    frames = [frame.f_code.co_qualname for error in errors for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((DOING[name] for name in reversed(frames) if name in DOING), '')


def starved(error: BaseException) -> bool:
    """Whether the process lacks something, and not the image that it reads: a damaged one may ask for any amount."""
    if isinstance(error, MemoryError):
        with contextlib.suppress(MemoryError):
            return not bytearray(PROBE)
    return bool(kind(error))


@contextlib.contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Raise ResourceError if something is used up in it: no fault of the file that is read there."""
    try:
        yield
    except Exception as error:
        if name := kind(error):
            raise ResourceError(f'out of {name} in {what}; {numbers(name, error)}') from error
        raise


# --------------------------------------------------------------------------
# how much there is


def numbers(what: str, error: BaseException, args: argparse.Namespace | None = None) -> str:
    """How much was asked for and how much there is, as far as known."""
    if what == 'open files':
        return f'ulimit -n is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}'
    if what == 'shared memory':
        return f'{room_of_shm()[1]}; {needs(args)}' if args else ''
    asked = re.search(r'ried to allocate ([\d.]+) ?(\w+)|nable to allocate ([\d.]+) (\w+)', str(error))
    number, unit = [part for part in asked.groups() if part] if asked else ('', '')
    more = [f'{size(int(number)) if unit == "bytes" else f"{number} {unit}"} more were asked for'] if asked else []
    if what == 'GPU memory':
        there = re.search(r'total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free', str(error))
        return ', '.join(more + ([f'{there[2]} of {there[1]} are free'] if there else []))
    return ', '.join([*more, memory()])


def size(number: float) -> str:
    """Bytes as people write them."""
    return f'{number / 1e9:.1f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'


def memory() -> str:
    """How much memory there is, and what limits it, in words."""
    most, whose = memory_limit()
    return f'{whose} {size(most)}'


def memory_limit() -> tuple[int, str]:
    """How many bytes of memory there are, and what limits it."""
    limits = {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'): 'this machine has'}
    for file in ('memory.max', 'memory/memory.limit_in_bytes'):  # of cgroups, which containers have
        with contextlib.suppress(OSError, ValueError):
            limits[int(Path('/sys/fs/cgroup', file).read_text())] = 'this container may have'
    if (own := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits[own] = 'ulimit -v allows'
    return min(limits), limits[min(limits)]


def free_memory() -> int:
    """About how many bytes of memory this process could still take; 0 if the system does not say."""
    try:
        available = re.search(r'MemAvailable: *(\d+) kB', Path('/proc/meminfo').read_text())
    except OSError:
        return 0
    of_ours = dist.local_ranks() * peak_memory()
    return min(int(available[1]) * 1024 if available else 0, memory_limit()[0] - of_ours)


def peak_memory(usage: resource.struct_rusage | None = None) -> int:
    """The most bytes of memory that this process has had at once, or the one whose usage is given."""
    usage = usage or resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def room_of_shm() -> tuple[float, str]:
    """Free bytes of shared memory, and the words for it."""
    if not os.access(SHM, os.W_OK):
        return 0, f'{SHM} is missing or cannot be written to'
    stat = os.statvfs(SHM)
    free, whole = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    return free if whole else math.inf, f'{SHM} has {size(free)} of {size(whole)} free'  # no size: no limit


def batch_bytes(args: argparse.Namespace) -> int:
    """Shared memory that a batch of uint8 images and its labels take, in whole pages."""
    sides = [getattr(args, 'eval_size', None) or args.input_size]
    sides += [] if getattr(args, 'eval', False) else [args.input_size]
    if hasattr(args, 'test_scales'):  # a label for each pixel, or one image at all scales, up to four times as long
        side = args.short_side or args.input_size
        tested = 3 * 4 * side**2 * sum(scale**2 for scale in args.test_scales)
        return (int(max(args.batch_size * 4 * args.input_size**2, tested)) // PAGE + 2) * PAGE
    planes = 4 if hasattr(args, 'short_side') else 3  # labels of pixels are one more
    return (args.batch_size * planes * max(sides) ** 2 // PAGE + 2) * PAGE


def loader_bytes(args: argparse.Namespace, batches: float = math.inf) -> int:
    """Shared memory that the loader processes of this machine may need for so many batches.

    At once there are those that are ready or on their way, and of the main process the one in use and the next.
    """
    return dist.local_ranks() * batch_bytes(args) * min(batches, args.num_workers * PREFETCH + 2)


def needs(args: argparse.Namespace) -> str:
    whose = f' of each of {dist.local_ranks()} ranks' if dist.local_ranks() > 1 else ''
    return f'{args.num_workers} loader processes{whose} need up to {size(loader_bytes(args))}'


# --------------------------------------------------------------------------
# loader processes


def why_killed(number: int) -> str:
    """What a signal that nobody here has sent to a loader process says of the machine."""
    if number == signal.SIGBUS:
        return f': out of shared memory; {room_of_shm()[1]}; {LESS_SHM}'
    return f' (by the system, if memory is used up: {memory()})' if number == signal.SIGKILL else ''


def cannot_start(workers: int, error: OSError) -> str:
    """What to say when `workers` loader processes cannot all be started: room for locks, memory, processes, files."""
    known = {errno.ENOSPC: room_of_shm()[1], errno.EAGAIN: 'ulimit -u limits processes'}
    there = known.get(error.errno) or numbers(kind(error), error)
    return f'{workers} loader processes cannot be started: {error.strerror or error}; {there}; fewer --num_workers'


# --------------------------------------------------------------------------
# what to change

LESS_SHM = (
    f'--num_workers 0 needs none; or take a smaller --batch_size, '
    f'or a larger {SHM} (docker run --shm-size=8g, or --ipc=host)'
)


def to_change(what: str, where: str, args: argparse.Namespace) -> str:
    """Flags with which it may fit."""
    workers, batch = getattr(args, 'num_workers', 0), getattr(args, 'batch_size', 0)
    if what == 'open files':
        return 'raise it (ulimit -n 65536)' + (', or take fewer --num_workers' if workers else '')
    if what == 'shared memory':
        return less_shm(args)
    if where == 'a loader process':
        return f'fewer --num_workers, such as {workers // 2}'
    if where == 'drawing pictures':
        return 'a smaller --count' if hasattr(args, 'count') else '--vis_freq 0 draws none'
    if where in ('making the model', 'trying the model'):
        return 'a smaller --model'
    if where == 'testing an image':
        return 'a smaller --short_side, or --test_mode slide'
    if getattr(args, 'eval', False):
        return f'a smaller batch: --batch_size {batch // 2}' if batch > 1 else ''
    if where in BATCHES:
        return less_memory(args, recompute=where == 'a training step')
    return '--device cpu' if what == 'GPU memory' and not batch else ''


def less_memory(args: argparse.Namespace, recompute: bool) -> str:
    """The same run with smaller batches, then with fewer activations."""
    mixed = any(getattr(args, name, None) for name in ('mixup', 'cutmix', 'cutmix_minmax'))  # in pairs
    sizes = [n for n in range(args.batch_size - 1, 0, -1) if args.batch_size % n == 0 and not (mixed and n % 2)]
    flags = f'--batch_size {sizes[0]}' if sizes else ''
    if sizes and (args.effective_batch_size is None or args.accum_iter > 1):  # else it is solved for
        flags += f' --accum_iter {args.accum_iter * args.batch_size // sizes[0]}'
    advice = [f'the same batch of a step in less memory: {flags}'] if sizes else []
    return '; '.join(advice + (['--grad_checkpoint'] if recompute and not args.grad_checkpoint else []))


def less_shm(args: argparse.Namespace) -> str:
    """Fewer loader processes, smaller batches, or more shared memory."""
    fit = (room_of_shm()[0] / dist.local_ranks() / batch_bytes(args) - 2) // PREFETCH
    return (f'--num_workers {fit:.0f} would fit, ' if 0 < fit < args.num_workers else '') + LESS_SHM


# --------------------------------------------------------------------------
# before anything is begun


def raise_open_files() -> None:
    """Take as many open files as the system gives without asking anyone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS has another limit below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def check_sockets() -> None:
    """Raise UserError if loader processes cannot make the sockets over which they hand over their batches."""
    try:
        folder = multiprocessing.util.get_temp_dir()
    except OSError as error:
        raise UserError(
            f'loader processes need a folder for sockets: {error.strerror or error}; '
            f'set TMPDIR to one that can be written to, or take --num_workers 0'
        ) from error
    over = len(os.fsencode(folder)) + SOCKET - LONGEST_SOCKET
    if over > 0:
        raise UserError(
            f'TMPDIR={Path(folder).parent} is {over} letters too long for the sockets of loader processes; '
            f'set TMPDIR to a shorter one, such as /tmp, or take --num_workers 0'
        )


def check_shm(args: argparse.Namespace, batches: int) -> None:
    """Raise ResourceError if shared memory has no room for what loader processes make of so many batches."""
    if not args.num_workers or sys.platform != 'linux':
        return
    free, told = room_of_shm()
    if free < loader_bytes(args, batches):
        raise ResourceError(f'too little shared memory: {told}; {needs(args)}; {less_shm(args)}')
