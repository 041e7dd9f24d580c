"""Small training runs for the tests: a folder of images, arguments, and processes."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import main_finetune
import main_pretrain
from scripts import finetune_detection, finetune_segmentation
from util import checkpoint, rng
from util.recipes import program
from util.run import Run

ROOT = Path(__file__).resolve().parent.parent
MODEL = ['--model', 'mirl_vit_tiny', '--input_size', '32', '--device', 'cpu', '--num_workers', '0', '--print_freq', '1']
SHORT = ['--batch_size', '8', '--epochs', '2', '--warmup_epochs', '1', '--lr', '1e-3']  # 8 steps of `images` an epoch
MIXED = ['--mixup', '0.8', '--cutmix', '1', '--use_ema', '--drop_path', '0.2']  # what fine-tuning can have on top
STATE = ('model', 'ema', 'optimizer', 'scaler', 'guard', 'record', 'epoch', 'step', 'logger')
MAINS = {'pretrain': main_pretrain, 'finetune': main_finetune}
PROGRAMS = MAINS | {'segment': finetune_segmentation, 'detect': finetune_detection}


def make_images(folder: Path, per_class: int = 22, classes: int = 3, val_per_class: int = 5, side: int = 40) -> Path:
    """`folder/{train,val}/<class>/*.png` of smooth noise with a colour per class."""
    numbers = np.random.default_rng(0)
    for split, count in (('train', per_class), ('val', val_per_class)):
        for label in range(classes):
            where = folder / split / f'class{label}'
            where.mkdir(parents=True)
            for i in range(count):
                coarse = numbers.integers(0, 256, (5, 5, 3), dtype=np.uint8)
                coarse[..., label] //= 3
                Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(where / f'{i}.png')
    return folder


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    return [*MODEL, '--data_path', str(data), '--output_dir', str(output), *map(str, more)]


def train(stage: str, data: Path, output: Path, *more: str) -> dict:
    """Run a main in this process; returns the last checkpoint."""
    main = PROGRAMS[stage]
    main.main(main.get_args_parser().parse(arguments(data, output, *more), stage=stage))
    return load(output)


def with_moments(stage: str, data: Path, folder: Path, *flags) -> tuple[Path, dict[tuple[int, int, bool], Path]]:
    """The folder of a finished run, and every state that it saved on the way, by (epoch or round, step, closed)."""
    moments = {}

    def save_and_copy(self, name, epoch, step, closed=True, save=Run.save, **more):
        save(self, name, epoch, step, closed, **more)
        moments[epoch.number, step, closed] = folder / f'{epoch.number}-{step}-{closed}.pth'
        shutil.copy(self.args.output_dir / name, moments[epoch.number, step, closed])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, 'save', save_and_copy)
        train(stage, data, folder / 'run', *flags, '--save_freq_steps', '1')
    return folder / 'run', moments


def load(output: Path, name: str = 'checkpoint-last.pth') -> dict:
    return torch.load(output / name, weights_only=True)


def command(
    stage: str, data: Path, output: Path, *more: str, ranks: int = 0, script: str = '', torchrun: bool = False
) -> list[str]:
    """The command line of a run in processes of its own; `script` replaces the main.

    With `ranks`, under a launcher: torchrun, or what stands in for it and forks them.
    """
    launcher = [sys.executable]
    if torchrun:
        launcher += ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', f'--master_port={free_port()}']
    elif ranks:
        launcher += [str(ROOT / 'tests/launcher.py'), str(ranks), str(free_port())]
    return [*launcher, str(ROOT / (script or program(stage))), *arguments(data, output, *more)]


def run(stage: str, data: Path, output: Path, *more: str, ranks: int = 0, fault: str = '', timeout: float = 300):
    """Run it to its end; `fault` is one of tests/faulty_run.py. Several ranks are started without torchrun."""
    line = command(stage, data, output, *more, script='tests/faulty_run.py' if fault else '')
    processes = [start(line, FAULT=fault, **place) for place in (places(ranks) if ranks else [{}])]
    try:
        said = [process.communicate(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Ended([process.returncode for process in processes], *map(''.join, zip(*said, strict=True)))


class Ended(NamedTuple):
    """The exit codes of a run's ranks, and all that they said."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """That of the first rank that failed."""
        return next(filter(None, self.codes), 0)


def places(ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each of its processes."""
    meeting = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': str(ranks)}
    return [meeting | {'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(ranks)]


def environment() -> dict[str, str]:
    """One thread per process, loopback only."""
    return os.environ | {
        'OMP_NUM_THREADS': '1',
        'GLOO_SOCKET_IFNAME': 'lo',
        'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1',
    }


@functools.cache
def server():
    """Forks processes of a server that has imported the mains; nothing in it has run."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(
        [
            *('main_pretrain', 'main_finetune', 'scripts.finetune_segmentation', 'scripts.finetune_detection'),
            'torch.utils.tensorboard',
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(ROOT))  # the server does not inherit sys.path
        warm = context.Process(target=print)
        warm.start()
        warm.join()
    return context


class Forked:
    """Stands in for `subprocess.Popen` of a program of the project: forked from `server`, it begins at once."""

    def __init__(self, argv: list[str], env: dict[str, str]):
        files = [tempfile.NamedTemporaryFile('a') for _ in range(2)]  # noqa: SIM115
        self.stdout, self.stderr = (open(file.name) for file in files)  # noqa: SIM115
        self.process = server().Process(target=begin, args=(argv, env, [file.name for file in files]))
        self.process.start()
        self.pid, self.kill, self.files = self.process.pid, self.process.kill, files
        atexit.register(self.kill)  # or multiprocessing waits for it

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.stdout.read(), self.stderr.read()


def begin(argv: list[str], env: dict[str, str], streams: list[str | Path], small: int = checkpoint.SMALL) -> None:
    """In a process of the server: run a program as the command line would, but for which checkpoints are small."""
    torch.set_num_threads(1)
    checkpoint.SMALL = small
    for number, name in enumerate(streams, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the default again, for loader processes
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = argv
    try:
        runpy.run_path(argv[0], run_name='__main__')
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def start(line: list[str], **variables: str) -> subprocess.Popen | Forked:
    """Begin a command, whose output can be read while it runs."""
    env = environment() | variables
    if line[0] == sys.executable and Path(line[1]).parent in (ROOT, ROOT / 'tests', ROOT / 'scripts'):
        return Forked(line[1:], env)
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def start_waiting(data: Path, output: Path, *more: str, step: int, ranks: int = 0) -> subprocess.Popen | Forked:
    """Begin pretraining, whose first rank waits in this step (of the run, from 0) until it is asked to stop, or killed.

    Returns once it does.
    """
    line = command('pretrain', data, output, *more, ranks=ranks, script='tests/faulty_run.py')
    process = start(line, FAULT=f'wait:0:{step}')
    read_until(process, 'waiting')
    return process


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def read_until(process: subprocess.Popen | Forked, text: str) -> None:
    """Read a process's lines up to one with this text in it."""
    ended = False
    while not ended:
        ended = process.poll() is not None
        for line in process.stdout:
            if text in line:
                return
        time.sleep(0.01)
    pytest.fail(f'{text!r} never came; stderr: {process.stderr.read()}')


def without_initialisation(monkeypatch) -> None:
    """Make networks without filling them: the large ones take seconds to draw."""
    for name in ('xavier_uniform_', 'normal_', 'trunc_normal_', 'kaiming_uniform_', 'kaiming_normal_', 'uniform_'):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
    for name in ('normal_', 'uniform_', 'erfinv_'):  # of timm's truncated normal, what a forward does not call
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, **kwargs: self)


@contextlib.contextmanager
def shapes():
    """Networks that are made here are shapes alone, and made at once."""
    on_cpu = functools.partial(torch.linspace, device='cpu')  # older timm reads its drop path rates off it
    with torch.device('meta'), pytest.MonkeyPatch.context() as patch:
        without_initialisation(patch)
        patch.setattr(torch, 'linspace', on_cpu)
        yield


def draw_plan(model, n: int, seed: int = 0):
    """A plan for n samples, a function of the seed."""
    return model.plan_from_noise(rng.uniform(np.random.default_rng(seed), model.noise_shape(n)))


class HostReads(TorchDispatchMode):
    """Records every operation that would make the host wait for a GPU."""

    WAITING = ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'is_nonzero', '_unique2')

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITING:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def processes_of(folder: Path) -> list[int]:
    """The processes, but this one, that have the folder in their command line."""
    found = []
    for proc in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):  # it has ended
            if str(folder).encode() in (proc / 'cmdline').read_bytes():
                found.append(int(proc.name))
    return [pid for pid in found if pid != os.getpid()]


def same(a, b) -> bool:
    """Whether two checkpoints' contents are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def equal_states(a: dict, b: dict) -> bool:
    """Whether two checkpoints hold the same state of training, to the bit."""
    return all(same(a.get(key), b.get(key)) for key in STATE)
