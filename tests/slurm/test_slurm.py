"""Training under a real SLURM: preempted, out of time, cancelled or stuck, and the same bytes in the end.

`pytest -m slurm` brings up a cluster of two virtual nodes on this machine (slurm_up.sh: Debian packages, as root) and
takes it down again unless it was up before. SLURM signals when it likes; so that a run of some seconds is in the middle
of an epoch then, its processes are held by SIGSTOP. SLURM itself continues (SIGCONT) what it asks to end.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import ROOT, load, make_images, same

HERE = Path(__file__).parent
CLUSTER = Path(os.environ.get('SLURM_DEV_ROOT', '/var/tmp/slurm-dev'))
LAUNCHER = [sys.executable, str(ROOT / 'scripts' / 'run_with_submitit.py'), 'pretrain']
SMALL = ['--nodes', '1', '--ngpus', '1', '--cpus-per-task', '1', '--timeout', '30']
TWO_BY_TWO = ['--nodes', '2', '--ngpus', '2']
TRAINING = [  # 12 steps of 16 images an epoch
    *['--model', 'mirl_vit_tiny', '--input_size', '32', '--device', 'cpu', '--num_workers', '1', '--print_freq', '1'],
    *['--batch_size', '4', '--epochs', '3', '--warmup_epochs', '1', '--lr', '1e-3'],
]
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]


# --------------------------------------------------------------------------
# the cluster


@pytest.fixture(scope='module')
def cluster():
    """The environment in which SLURM's commands work."""
    if os.geteuid() != 0:
        pytest.skip('a throw-away SLURM needs root: its daemons change user ids')
    if not Path('/etc/debian_version').exists() or not shutil.which('apt-get'):
        pytest.skip("slurm_up.sh installs Debian's packages; this is no Debian with apt-get")
    was_up = alive(CLUSTER / 'run' / 'slurmctld.pid')
    up = subprocess.run([HERE / 'slurm_up.sh'], capture_output=True, text=True, timeout=110)
    assert up.returncode == 0, up.stderr
    path = f'{CLUSTER}/bin:{os.environ["PATH"]}'
    yield os.environ | {'SLURM_CONF': f'{CLUSTER}/slurm.conf', 'PATH': path, 'GLOO_SOCKET_IFNAME': 'lo'}
    if not was_up:
        subprocess.run([HERE / 'slurm_down.sh', '--purge'], check=True, capture_output=True, timeout=60)


def alive(pidfile: Path) -> bool:
    return pidfile.exists() and Path(f'/proc/{pidfile.read_text().strip()}').exists()


class Submitted:
    """A job of the launcher."""

    def __init__(self, slurm, folder: Path, *flags: str):
        self.slurm, self.folder = slurm, folder
        done = slurm.launch('--job_dir', folder, *flags)
        assert done.returncode == 0, done.stderr
        self.id = re.search(r'^job (\d+)', done.stdout)[1]

    def field(self, name: str) -> str:
        shown = self.slurm.run('scontrol', '-o', 'show', 'job', self.id).stdout
        return re.search(rf'\b{name}=(\S*)', shown)[1]

    def log(self, rank: int = 0) -> str:
        file = self.folder / f'{self.id}_{rank}_log.out'
        return file.read_text() if file.exists() else ''

    def wait_for(self, text: str, seconds: float = 60) -> None:
        wait(lambda: text in self.log(), seconds, lambda: f'{text!r} in the log:\n{self.log()[-3000:]}')

    def wait_for_state(self, *states: str, seconds: float = 60) -> None:
        wait(lambda: self.field('JobState') in states, seconds, lambda: f'{states}; log:\n{self.log()[-3000:]}')

    def signal_ranks(self, number: int, rank: int | None = None) -> list[int]:
        """Send a signal to all processes of the ranks, or of one."""
        pids = [pid for pid in processes(self.folder, 'submitit.core._submit') if rank in (None, rank_of(pid))]
        for pid in pids:
            os.kill(pid, number)
        return pids


class Slurm:
    def __init__(self, environment: dict[str, str], folder: Path):
        self.environment, self.folder = environment, folder
        self.data = make_images(folder / 'images', per_class=64)  # 3 classes: 192 images

    def run(self, *command) -> subprocess.CompletedProcess:
        line = [str(word) for word in command]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, env=self.environment, cwd=self.folder)

    def launch(self, *flags) -> subprocess.CompletedProcess:
        return self.run(*LAUNCHER, *SMALL, *TRAINING, '--data_path', self.data, *flags)


@pytest.fixture(scope='module')
def slurm(cluster, tmp_path_factory):
    """The cluster; afterwards none of these tests' jobs and processes may be left."""
    slurm = Slurm(cluster, tmp_path_factory.mktemp('slurm'))
    yield slurm
    queued = slurm.run('squeue', '-h', '-o', '%A %Z').stdout.splitlines()
    mine = [line.split()[0] for line in queued if str(slurm.folder) in line]
    if mine:
        slurm.run('scancel', *mine)
    wait(lambda: not processes(slurm.folder), 30, lambda: f'the end of processes {processes(slurm.folder)}')


def wait(condition, seconds: float, what) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'after {seconds:.0f} s still waiting for {what()}'
        time.sleep(0.05)


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


def rank_of(pid: int) -> int | None:
    found = re.search(rb'\0SLURM_PROCID=(\d+)\0', Path(f'/proc/{pid}/environ').read_bytes())
    return int(found[1]) if found else None


def finished_alike(job: Submitted, undisturbed: dict) -> bool:
    """Whether all of the training state in the job's last checkpoint is that of the undisturbed run, to the bit."""
    last = load(job.folder)
    return all(same(last[key], undisturbed[key]) for key in ('model', 'optimizer', 'epoch', 'step', 'logger'))


# --------------------------------------------------------------------------
# jobs that end as they should


@pytest.fixture(scope='module')
def undisturbed(slurm) -> dict:
    """The last checkpoint of two nodes x two tasks that nobody interrupts."""
    job = Submitted(slurm, slurm.folder / 'undisturbed', *TWO_BY_TWO)
    job.wait_for_state('COMPLETED')
    assert 'on 4 x cpu' in job.log()
    last = load(job.folder)
    assert (last['epoch'], last['step']) == (2, 12)
    assert (job.folder.stat().st_mode & 0o777) == 0o700
    return last


def test_preempted_by_a_higher_partition(slurm, undisturbed, measured):
    job = Submitted(slurm, slurm.folder / 'preempted', *TWO_BY_TWO)
    job.wait_for('Epoch: [1] [ 3/12]')
    job.signal_ranks(signal.SIGSTOP)
    high = slurm.run('sbatch', '-p', 'high', '-N2', '--exclusive', '-o', '/dev/null', '--wrap', 'sleep 1')
    assert high.returncode == 0, high.stderr
    began = time.monotonic()
    job.wait_for('stopped on request at epoch 1, step')
    stopped = time.monotonic() - began
    job.wait_for_state('COMPLETED', seconds=90)
    log = job.log()
    assert 'this job is preempted' in log
    assert f'Requeued job {job.id}' in log
    assert job.field('Restarts') == '1'
    assert log.count('stopped on request') == 1
    place = re.search(r'stopped on request at (epoch 1, step \d+)', log)[1]
    assert f'checkpoint-last.pth at {place}' in log
    assert finished_alike(job, undisturbed)
    measured(f'preempted: stopped {stopped:.1f} s after the other job came, at {place}; resumed there; same bytes')


def test_time_limit(slurm, undisturbed, measured):
    # SLURM looks every 30 s whether a limit will be near before it looks again: this is a signal after 25 to 55 s
    job = Submitted(slurm, slurm.folder / 'limit', *TWO_BY_TWO, '--timeout', '1', '--signal_delay_s', '5')
    job.wait_for('Epoch: [1] [ 3/12]')
    job.signal_ranks(signal.SIGSTOP)
    job.wait_for('stopped on request at epoch 1, step')
    job.wait_for_state('COMPLETED', seconds=60)
    log = job.log()
    assert f'Requeued job {job.id} (999 remaining timeouts)' in log
    place = re.search(r'stopped on request at (epoch 1, step \d+)', log)[1]
    assert f'checkpoint-last.pth at {place}' in log
    assert finished_alike(job, undisturbed)
    measured(f'time limit: stopped at {place}; resumed there; same bytes')


def test_cancelled_then_submitted_again(slurm, undisturbed, measured):
    folder = slurm.folder / 'cancelled'
    job = Submitted(slurm, folder, *TWO_BY_TWO)
    job.wait_for('Epoch: [1] [ 3/12]')
    job.signal_ranks(signal.SIGSTOP)
    slurm.run('scancel', job.id)
    job.wait_for_state('CANCELLED')
    job.wait_for('stopped on request at epoch 1, step')
    wait(lambda: not processes(folder), 30, lambda: 'the end of the job')
    saved = load(folder)
    assert saved['epoch'] == 1
    assert 3 <= saved['step'] <= 5
    again = Submitted(slurm, folder, *TWO_BY_TWO, '--resume', 'auto')
    again.wait_for_state('COMPLETED')
    assert f'at epoch 1, step {saved["step"]} of 12' in again.log()
    assert finished_alike(again, undisturbed)
    measured(f'cancelled: saved at step {saved["step"]} of epoch 1; submitted again; same bytes')


def test_stuck_rank_ends_the_job(slurm, measured):
    job = Submitted(slurm, slurm.folder / 'stuck', '--ngpus', '2', '--dist_timeout', '5', '--epochs', '50')
    job.wait_for('Epoch: [1] [ 3/24]')
    began = time.monotonic()
    assert job.signal_ranks(signal.SIGSTOP, rank=1)
    job.wait_for_state('FAILED', seconds=5 + 30)
    measured(f'stuck rank: job failed {time.monotonic() - began:.1f} s after it hung, with --dist_timeout 5')
    wait(lambda: not processes(job.folder), 30, lambda: 'the end of the stuck rank')


def test_array_of_seeds(slurm):
    flags = ['--epochs', '1', '--warmup_epochs', '0', '--batch_size', '16']
    done = slurm.launch('--seeds', '0', '1', '--job_dir', 'seeds', *flags)
    assert done.returncode == 0, done.stderr
    ids = re.findall(r'^job (\d+_\d): pretrain seed\d$', done.stdout, re.MULTILINE)
    assert len(ids) == 2
    folders = [slurm.folder / 'seeds' / job for job in ids]
    assert [f'  folder {folder}' in done.stdout for folder in folders] == [True, True]
    files = [folder / f'{job}_0_result.pkl' for folder, job in zip(folders, ids, strict=True)]
    wait(lambda: all(file.exists() for file in files), 60, lambda: f'the end of jobs {ids}')
    first, second = (load(folder) for folder in folders)
    assert [first['args']['seed'], second['args']['seed']] == [0, 1]
    assert not same(first['model'], second['model'])


# --------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize('flags', [['--nodes', '9'], ['--timeout', '100800'], ['--partition', 'nowhere']])
def test_impossible_request(slurm, flags):
    done = slurm.launch('--job_dir', 'impossible', *flags)
    assert (done.returncode, done.stdout) == (2, '')
    [line] = done.stderr.splitlines()
    assert 'error: SLURM refused: sbatch: error: ' in line


def test_gpus_are_asked_for_and_missed_in_one_line(slurm):
    """The cluster's GPUs are only numbers: the job gets two, and finds none."""
    job = Submitted(slurm, slurm.folder / 'gpus', '--ngpus', '2', '--device', 'cuda')
    assert job.field('TresPerNode').endswith('gpu:2')
    job.wait_for_state('FAILED')
    assert 'main_pretrain.py: error: --device cuda: no GPU is visible; use --device cpu' in job.log().splitlines()
    assert 'Traceback' not in job.log()
