"""What the SLURM tests do with a cluster: submit jobs by the launcher, hold them in mid-epoch, take them their nodes.

SLURM signals when it likes; so that a run of some seconds is in the middle of an epoch then, its processes are held by
SIGSTOP. SLURM itself continues (SIGCONT) what it asks to end.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from training import ROOT, load, make_images

LAUNCHER = [sys.executable, str(ROOT / 'scripts' / 'run_with_submitit.py'), 'pretrain']
SMALL = ['--nodes', '1', '--ngpus', '1', '--cpus-per-task', '1', '--timeout', '30']
TWO_BY_TWO = ['--nodes', '2', '--ngpus', '2']  # all of two nodes
TRAINING = [  # 12 steps of 16 images an epoch, by four tasks
    *['--model', 'mirl_vit_tiny', '--input_size', '32', '--device', 'cpu', '--num_workers', '1', '--print_freq', '1'],
    *['--batch_size', '4', '--epochs', '3', '--warmup_epochs', '1', '--lr', '1e-3'],
]


class Slurm:
    """The cluster, with a folder for jobs and one of images."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self.environment, self.folder = environment, folder
        self.data = make_images(folder / 'images', per_class=64)  # 3 classes: 192 images

    def run(self, *command) -> subprocess.CompletedProcess:
        line = [str(word) for word in command]
        return subprocess.run(line, capture_output=True, text=True, timeout=120, env=self.environment, cwd=self.folder)

    def ask(self, *command) -> str:
        """The output of a command that must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f'{command}: {done.stderr}'
        return done.stdout

    def launch(self, *flags) -> subprocess.CompletedProcess:
        return self.run(*LAUNCHER, *SMALL, *TRAINING, '--data_path', self.data, *flags)

    def submit(self, folder: str | Path, *flags) -> 'Job':
        done = self.launch('--job_dir', self.folder / folder, *flags)
        assert done.returncode == 0, done.stderr
        return Job(self, re.search(r'^job (\d+):', done.stdout)[1], self.folder / folder)


class Job:
    """A job, or one of an array. Each start of it is a life, counted from 1."""

    def __init__(self, slurm: Slurm, number: str, folder: Path):
        self.slurm, self.id, self.folder = slurm, number, folder

    def field(self, name: str) -> str:
        return re.search(rf'\b{name}=(\S*)', self.slurm.ask('scontrol', '-o', 'show', 'job', self.id))[1]

    def log(self, rank: int = 0) -> str:
        file = self.folder / f'{self.id}_{rank}_log.out'
        return file.read_text() if file.exists() else ''

    def life(self, number: int) -> str:
        """Rank 0's log of a life."""
        lives = self.log().split('Starting with JobEnvironment')
        return lives[number] if number < len(lives) else ''

    def wait_for(self, text: str, life: int = 1, seconds: float = 90) -> None:
        wait(lambda: text in self.life(life), seconds, lambda: f'{text!r} in life {life}:\n{self.log()[-3000:]}')

    def wait_for_state(self, state: str, seconds: float = 90) -> None:
        def reached() -> bool:
            return self.field('JobState') == state

        wait(reached, seconds, lambda: f'{state}; log:\n{self.log()[-3000:]}', every=0.5)

    def wait_for_end(self) -> None:
        wait(lambda: not processes(self.folder), 30, lambda: f'the end of processes {processes(self.folder)}')

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to all processes of the ranks, or of one, as SLURM does: loader workers get it too."""
        mine = {'SLURM_JOB_ID': self.field('JobId')} | ({} if rank is None else {'SLURM_PROCID': str(rank)})
        for pid in processes(self.slurm.folder, 'submitit.core._submit'):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                if mine.items() <= environment_of(pid).items():
                    os.kill(pid, number)

    def hold(self, epoch: int, life: int = 1) -> None:
        """Stop the job's processes in the middle of an epoch; SIGCONT goes on."""
        self.wait_for(f'Epoch: [{epoch}] [ 3/', life)
        self.signal(signal.SIGSTOP)

    def preempt(self) -> None:
        """Let a job of a higher partition take the nodes: SLURM sends SIGUSR2."""
        nodes = self.field('NodeList')
        self.slurm.ask('sbatch', '-p', 'high', '-w', nodes, '--exclusive', '-o', '/dev/null', '--wrap', 'sleep 1')

    def requeue(self) -> None:
        """What an administrator does: SLURM sends SIGTERM, and SIGKILL after KillWait."""
        self.slurm.ask('scontrol', 'requeue', self.id)

    def places(self) -> list[str]:
        """Where the job has stopped, after each of which it resumed, having done each step of 3 epochs once."""
        log = self.log()
        stops = re.findall(r'stopped on request at (epoch \d+, step \d+)', log)
        assert re.findall(r'resumed from \S+ at (epoch \d+, step \d+)', log) == stops
        steps = re.findall(r'Epoch: \[(\d)\] \[ *(\d+)/\d+\]', log)
        assert [(int(epoch), int(step)) for epoch, step in steps] == [(e, s) for e in range(3) for s in range(1, 13)]
        return stops

    def result(self) -> dict:
        """The last checkpoint, when the job has completed."""
        self.wait_for_state('COMPLETED')
        return load(self.folder)


def wait(condition, seconds: float, what, every: float = 0.05) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'after {seconds:.0f} s still waiting for {what()}'
        time.sleep(every)


def processes(folder: Path, *words: str) -> list[int]:
    """Python processes whose command line has these words and the folder in it."""
    found = []
    for proc in Path('/proc').glob('[0-9]*'):
        try:
            line = (proc / 'cmdline').read_bytes().decode(errors='replace').split('\0')
        except OSError:  # it has ended
            continue
        text = ' '.join(line)
        if 'python' in Path(line[0]).name and str(folder) in text and all(word in text for word in words):
            found.append(int(proc.name))
    return [pid for pid in found if pid != os.getpid()]


def environment_of(pid: int) -> dict[str, str]:
    words = Path(f'/proc/{pid}/environ').read_bytes().decode(errors='replace').split('\0')
    return {name: value for name, _, value in (word.partition('=') for word in words)}
