"""The cluster of the SLURM tests and a run on it that nobody disturbs: one of each for all test processes."""

import fcntl
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from cluster import TWO_BY_TWO, Job, Slurm, processes, wait

HERE = Path(__file__).parent
CLUSTER = Path(os.environ.get('SLURM_DEV_ROOT', '/var/tmp/slurm-dev'))


@pytest.fixture(scope='session')
def cluster(shared):
    """The environment in which SLURM's commands work. The last test process that uses the cluster takes it down."""
    if os.geteuid() != 0:
        pytest.skip('a throw-away SLURM needs root: its daemons change user ids')
    if not Path('/etc/debian_version').exists() or not shutil.which('apt-get'):
        pytest.skip("slurm_up.sh installs Debian's packages; this is no Debian with apt-get")
    with open(shared / 'gate.lock', 'w') as gate, open(shared / 'users.lock', 'w') as users:
        fcntl.flock(gate, fcntl.LOCK_EX)
        if not alive(CLUSTER / 'run' / 'slurmctld.pid'):
            (shared / 'ours').touch()
        up = subprocess.run([HERE / 'slurm_up.sh'], capture_output=True, text=True, timeout=110)
        assert up.returncode == 0, up.stderr
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        path = f'{CLUSTER}/bin:{os.environ["PATH"]}'
        yield os.environ | {'SLURM_CONF': f'{CLUSTER}/slurm.conf', 'PATH': path, 'GLOO_SOCKET_IFNAME': 'lo'}
        fcntl.flock(gate, fcntl.LOCK_EX)
        with suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (shared / 'ours').exists():
                subprocess.run([HERE / 'slurm_down.sh', '--purge'], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope='session')
def shared(tmp_path_factory) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base


def alive(pidfile: Path) -> bool:
    return pidfile.exists() and Path(f'/proc/{pidfile.read_text().strip()}').exists()


@pytest.fixture(scope='session')
def slurm(cluster, tmp_path_factory):
    """The cluster for this test process, none of whose jobs and processes may be left in the end."""
    slurm = Slurm(cluster, tmp_path_factory.mktemp('slurm'))
    yield slurm
    queued = slurm.ask('squeue', '-h', '-o', '%A %Z').splitlines()
    mine = [line.split()[0] for line in queued if str(slurm.folder) in line]
    if mine:
        slurm.run('scancel', *mine)
    wait(lambda: not processes(slurm.folder), 30, lambda: f'the end of processes {processes(slurm.folder)}')


@pytest.fixture(scope='session')
def undisturbed(slurm, shared) -> Job:
    """Two nodes x two tasks that nobody interrupts: submitted by whoever needs it first."""
    folder, number = shared / 'undisturbed', shared / 'undisturbed.id'
    with open(shared / 'undisturbed.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not number.exists():
            number.write_text(slurm.submit(folder, *TWO_BY_TWO).id)
    return Job(slurm, number.read_text(), folder)
