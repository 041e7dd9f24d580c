"""Small training runs for the tests: a folder of images, arguments, and processes."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain
from util import rng

ROOT = Path(__file__).resolve().parent.parent
MODEL = ['--model', 'mirl_vit_tiny', '--input_size', '32', '--device', 'cpu', '--num_workers', '0', '--print_freq', '1']
SHORT = ['--batch_size', '8', '--epochs', '2', '--warmup_epochs', '1', '--lr', '1e-3']  # 8 steps of `images` an epoch
MIXED = ['--mixup', '0.8', '--cutmix', '1', '--use_ema', '--drop_path', '0.2']  # what fine-tuning can have on top
STATE = ('model', 'ema', 'optimizer', 'scaler', 'guard', 'record', 'epoch', 'step', 'logger')
MAINS = {'pretrain': main_pretrain, 'finetune': main_finetune}


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
    main = MAINS[stage]
    main.main(main.get_args_parser().parse(arguments(data, output, *more), stage=stage))
    return load(output)


def load(output: Path, name: str = 'checkpoint-last.pth') -> dict:
    return torch.load(output / name, weights_only=True)


def command(stage: str, data: Path, output: Path, *more: str, ranks: int = 0, script: str = '') -> list[str]:
    """The command line of a run in processes of its own; with `ranks`, under torchrun; `script` replaces the main."""
    launcher = [sys.executable]
    if ranks:
        launcher += ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', f'--master_port={free_port()}']
    return [*launcher, str(ROOT / (script or f'main_{stage}.py')), *arguments(data, output, *more)]


def run(stage: str, data: Path, output: Path, *more: str, ranks: int = 0, fault: str = '', timeout: float = 300):
    """Run it to its end; `fault` is one of tests/faulty_run.py."""
    line = command(stage, data, output, *more, ranks=ranks, script='tests/faulty_run.py' if fault else '')
    env = environment() | {'FAULT': fault}
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=env)


def environment() -> dict[str, str]:
    """One thread per process, loopback only."""
    return os.environ | {
        'OMP_NUM_THREADS': '1',
        'GLOO_SOCKET_IFNAME': 'lo',
        'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1',
    }


def start(line: list[str], **variables: str) -> subprocess.Popen:
    """Begin a command, whose output can be read while it runs."""
    env = environment() | variables
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def read_until(process: subprocess.Popen, text: str) -> None:
    """Read a process's lines up to one with this text in it."""
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f'{text!r} never came; stderr: {process.stderr and process.stderr.read()}')


def draw_plan(model, n: int, seed: int = 0):
    """A plan for n samples, a function of the seed."""
    return model.plan_from_noise(rng.uniform(np.random.default_rng(seed), model.noise_shape(n)))


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
