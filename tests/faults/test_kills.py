"""Runs that are killed at random moments until they are done, and then hold the bytes of one that nobody killed.

`KILLS=200` says how many kills. A kill may fall anywhere: before the first step, into a step, an evaluation, a save, or
between the two renames of one. Most runs are forked from a server that has imported everything, and so begin at once.
"""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from training import MIXED, SHORT, begin, command, environment, equal_states, load, processes_of, server

from util import checkpoint, digests

KILLS = int(os.environ.get('KILLS', '200'))
COMMON = [*SHORT, '--epochs', '3', '--save_freq_steps', '1', '--save_freq', '1', '--keep_last', '2']
# a model of every method, with and without BatchNorm; evaluation, averages and mixup; accumulation; loader processes
CASES = {
    'MIRL': ('pretrain', ['--accum_iter', '2']),
    'MIRL, two loader processes': ('pretrain', ['--num_workers', '2']),
    'MIRL fine-tuned': ('finetune', MIXED),
    'MixMAE': ('pretrain', ['--model', 'mixmae_tiny']),
    'LocalMIM': ('pretrain', ['--model', 'localmim_vit_tiny']),
    'A2MIM, ResNet': ('pretrain', ['--model', 'a2mim_resnet_tiny', '--opt', 'lamb']),
}
pytestmark = [pytest.mark.faults, pytest.mark.timeout(60 + 30 * KILLS)]


class Chain:
    """A run that is begun again and again in one folder. Checkpoints from `small` bytes on are written on a thread."""

    def __init__(self, stage: str, images: Path, folder: Path, flags: list[str], small: int = checkpoint.SMALL):
        self.folder, self.small = folder, small
        self.argv = command(stage, images, folder, *flags, '--resume', 'auto')[1:]
        self.log = folder.with_suffix('.log')

    def go(self, seconds: float | None) -> int | None:
        """Begin or go on, and kill it with its loader processes after so long. Its exit code, or None."""
        process = server().Process(target=begin, args=(self.argv, environment(), [self.log, self.log], self.small))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            return None
        return process.exitcode


def unloadable(folder: Path) -> list[str]:
    """Checkpoints that a plain torch.load does not take, or whose sums do not agree."""
    bad = []
    for file in checkpoint.any_in(folder):
        try:
            torch.load(file, weights_only=True)
            assert digests.agrees(file)
        except Exception as error:
            bad.append(f'{file.name}: {error}')
    return bad


@pytest.mark.promise(4)
@pytest.mark.fault(15)
def test_random_kills(images, tmp_path, measured):
    rng = random.Random(KILLS)
    kills = runs = resumes = torn = 0
    undisturbed, seconds = {}, {}
    for name, (stage, flags) in CASES.items():
        chain = Chain(stage, images, tmp_path / f'whole {name}', [*COMMON, *flags])
        began = time.monotonic()
        assert chain.go(100) == 0, chain.log.read_text()[-3000:]
        undisturbed[name], seconds[name] = load(chain.folder), time.monotonic() - began
    for name in itertools.cycle(CASES):
        if kills >= KILLS:
            break
        runs += 1
        stage, flags = CASES[name]
        small = checkpoint.SMALL * (runs % 2)  # every second run writes while it trains
        chain, code = Chain(stage, images, tmp_path / f'run {runs}', [*COMMON, *flags], small), None
        while code is None:
            code = chain.go(rng.uniform(0, seconds[name]) if kills < KILLS else 100)
            if code is None:
                kills += 1
                resumes += bool(checkpoint.any_in(chain.folder))
                torn += bool(list(chain.folder.glob('.checkpoint-*.tmp')))
                assert not unloadable(chain.folder)
        assert code == 0, chain.log.read_text()[-3000:]
        assert equal_states(load(chain.folder), undisturbed[name]), f'{name}: other bytes'
        assert not list(chain.folder.glob('.*.tmp'))
        assert len(checkpoint.numbered(chain.folder)) == 2
    assert not processes_of(tmp_path)
    measured(
        f'{kills} random kills of {runs} runs: 0 checkpoints unloadable, 0 runs that did not resume, 0 final states '
        f'different; {torn} kills fell into the writing of a file, {kills - resumes} before the first checkpoint'
    )


@pytest.mark.promise(4)
@pytest.mark.skipif(KILLS < 20, reason='ten kills are of single processes')
def test_random_kills_of_ranks(images, tmp_path, measured):
    """Under torchrun: rank 0, rank 1, or torchrun itself."""
    flags = [*COMMON, '--batch_size', '4', '--resume', 'auto', '--dist_timeout', '10']
    rng, kills = random.Random(2), 0

    def go(folder: Path, seconds: float | None) -> int | None:
        line = command('pretrain', images, folder, *flags, ranks=2, torchrun=True)
        with open(folder.with_suffix('.log'), 'ab') as log:
            process = subprocess.Popen(line, stdout=log, stderr=log, env=environment(), start_new_session=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(seconds)
            victims = [pid for pid in processes_of(folder) if pid != process.pid] or [process.pid]
            os.kill(rng.choice([process.pid, *victims]), signal.SIGKILL)
            process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return None

    assert go(tmp_path / 'whole', None) == 0
    while kills < KILLS // 10:
        folder, code = tmp_path / f'run {kills}', None
        while code is None:
            code = go(folder, rng.uniform(3, 12) if kills < KILLS // 10 else None)
            kills += code is None
            assert not unloadable(folder)
        assert code == 0, folder.with_suffix('.log').read_text()[-3000:]
        assert equal_states(load(folder), load(tmp_path / 'whole'))
    measured(f'{kills} random kills of a rank or of torchrun: 0 unloadable, 0 not resumed, 0 different')
