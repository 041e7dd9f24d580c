"""Requests to stop (SIGTERM, SIGUSR2, Ctrl-C) at any moment: saved, exit code 75, and resumed to the same bytes."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import ROOT, SHORT, command, equal_states, free_port, load, read_until, run, start, start_waiting, train

import engine_finetune
import main_finetune
from util import checkpoint, dist, signals
from util.data import datasets
from util.errors import StorageError
from util.optim import GuardedOptimizer
from util.run import Run
from util.run_folder import alive

FLAGS = [*SHORT, '--batch_size', '16', '--use_ema']  # 4 steps an epoch
MOMENTS = {  # what is running when the signal comes, and where the run is to stop: epoch and step
    'before the first step': (Run, 'announce', 1, (0, 0)),
    'while the loader starts': (datasets, 'loader', 1, (0, 0)),
    'in a step': (GuardedOptimizer, 'backward', 2, (0, 2)),
    'in a save': (checkpoint, 'write', 1, (0, 4)),  # of an epoch that is still to be evaluated
    'in an evaluation': (engine_finetune.F, 'cross_entropy', 1, (1, 0)),
}

pytestmark = pytest.mark.xdist_group('requests')  # one test process, so that `finished` is made once


@pytest.fixture(scope='module')
def finished(images, tmp_path_factory):
    """The folder of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp('whole')
    train('finetune', images, folder, *FLAGS)
    return folder


@pytest.fixture(scope='module')
def whole(finished):
    return load(finished)


def untimed(folder) -> list[str]:
    """log.txt without what a repeat does not leave equal."""
    lines = (folder / 'log.txt').read_text().splitlines()
    return [re.sub('"(time|images_per_s|waiting_for_data)": [^,]+, ', '', line) for line in lines]


@pytest.fixture(autouse=True)
def handlers():
    """A run that has stopped is deaf to signals; this process shall not be."""
    before = {number: signal.getsignal(number) for number in signals.MEANING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signal_at(patch, owner, name: str, call: int, *numbers: int) -> None:
    """Have these signals come at the start of the n-th call of a function."""
    original, calls = getattr(owner, name), 0

    def signalled(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            for number in numbers:
                signal.raise_signal(number)
        return original(*args, **kwargs)

    patch.setattr(owner, name, signalled)


def stopped_at(images, folder, capfd) -> tuple[int, int]:
    with pytest.raises(SystemExit) as caught:
        train('finetune', images, folder, *FLAGS, '--resume', 'auto')
    assert caught.value.code == 75
    saved = load(folder)
    assert checkpoint.digests.agrees(folder / checkpoint.LAST)
    place = (saved['epoch'], saved['step'])
    epoch, step = (place[0] + 1, 0) if place[1] == saved['steps'] and saved['closed'] else place
    [line] = [line for line in capfd.readouterr().out.splitlines() if line.startswith('stopped on request')]
    assert line == f'stopped on request at epoch {epoch}, step {step} of 4; state saved: resume with --resume auto'
    return epoch, step


@pytest.mark.fault(20)
@pytest.mark.parametrize('moment', MOMENTS)
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGUSR2'])
def test_a_request_at_any_moment(name, moment, images, finished, whole, tmp_path, monkeypatch, capfd):
    """Outside of submitit's jobs SIGUSR2 is the same as SIGTERM. What was not evaluated is, when the run is resumed."""
    owner, function, call, place = MOMENTS[moment]
    with monkeypatch.context() as patch:
        signal_at(patch, owner, function, call, getattr(signal, name))
        where = stopped_at(images, tmp_path, capfd)
    assert where == place
    if name == 'SIGTERM' or moment == 'in a step':
        resumed = train('finetune', images, tmp_path, *FLAGS, '--resume', 'auto')
        assert equal_states(resumed, whole)
        assert untimed(tmp_path) == untimed(finished)


@pytest.mark.fault(20)
def test_other_requests(images, tmp_path, monkeypatch, capfd):
    """A terminal that is lost, `sbatch --signal=USR1@90`, a limit of CPU time; a full disk takes what is printed."""
    signal_at(monkeypatch, GuardedOptimizer, 'backward', 2, signal.SIGHUP)
    assert stopped_at(images, tmp_path, capfd) == (0, 2)
    assert json.loads((tmp_path / 'status.json').read_text())['state'] == 'stopped'


def test_asked_twice_before_an_evaluation(images, whole, tmp_path, monkeypatch, capfd):
    """The epoch is evaluated in the end: its line in log.txt, its record."""
    for owner, name in ((checkpoint, 'write'), (Run, 'announce')):
        with monkeypatch.context() as patch:
            signal_at(patch, owner, name, 1, signal.SIGTERM)
            assert stopped_at(images, tmp_path, capfd) == (0, 4)
    resumed = train('finetune', images, tmp_path, *FLAGS, '--resume', 'auto')
    assert equal_states(resumed, whole)
    assert len((tmp_path / 'log.txt').read_text().splitlines()) == 2


def test_nothing_is_called_saved_before_it_is(images, tmp_path, monkeypatch):
    """The disk is full when the run is asked to stop."""

    def no_space(state, file):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        signal_at(patch, GuardedOptimizer, 'backward', 2, signal.SIGTERM)
        patch.setattr(checkpoint, 'write', no_space)
        with pytest.raises(StorageError):
            train('finetune', images, tmp_path, *FLAGS)
    status = json.loads((tmp_path / 'status.json').read_text())
    assert (status['state'], status['exit_code']) == ('failed', 5)


@pytest.mark.fault(21)
def test_again_during_the_save(images, whole, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        signal_at(patch, GuardedOptimizer, 'backward', 3, signal.SIGTERM)
        signal_at(patch, checkpoint, 'write', 1, signal.SIGTERM, signal.SIGTERM)
        where = stopped_at(images, tmp_path, capfd)
    assert where == (0, 3)
    resumed = train('finetune', images, tmp_path, *FLAGS, '--resume', 'auto')
    assert equal_states(resumed, whole)


@pytest.mark.fault(22)
def test_sigterm_while_sigusr2_is_obeyed(images, whole, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        signal_at(patch, GuardedOptimizer, 'backward', 3, signal.SIGUSR2)
        signal_at(patch, main_finetune.dist, 'barrier', 1, signal.SIGTERM)
        where = stopped_at(images, tmp_path, capfd)
    assert where == (0, 3)
    resumed = train('finetune', images, tmp_path, *FLAGS, '--resume', 'auto')
    assert equal_states(resumed, whole)


# --------------------------------------------------------------------------
# the flag


@pytest.fixture
def installed():
    signals.install()
    yield
    signals.restore()


def test_signals_only_set_a_flag(installed):
    assert signals.requested() == 0
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert signals.requested() == signals.STOP
    signal.raise_signal(signal.SIGUSR2)
    signal.raise_signal(signal.SIGTERM)
    assert signals.requested() == signals.REQUEUE


def test_before_there_is_something_to_save():
    """Ctrl-C is Python's own then."""
    signals.install_early()
    try:
        for number in set(signals.ASKING) - {signal.SIGINT}:
            with pytest.raises(SystemExit) as caught:
                signal.raise_signal(number)
            assert caught.value.code == 75
    finally:
        signals.restore()


@pytest.mark.parametrize('name', ['HUP', 'INT', 'TERM', 'USR1'])
def test_what_was_ignored_stays_ignored(name):
    """As by `nohup`."""
    program = f"""
import signal
from util import signals
signals.install_early()
signals.install()
for number in (signal.SIG{name}, signal.SIGXCPU):
    signal.raise_signal(number)
    print(signals.requested())
"""
    line = ['sh', '-c', f'trap "" {name}; exec "$0" "$@"', sys.executable, '-c', program]
    assert subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60).stdout == '0\n1\n'


def test_ctrl_c_where_nothing_can_be_printed(installed, monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(signals.os, 'write', broken)
    signal.raise_signal(signal.SIGINT)
    assert signals.requested() == signals.STOP


def test_second_ctrl_c_does_not_wait(installed):
    signal.raise_signal(signal.SIGINT)
    assert signals.requested() == signals.STOP
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize('number', [signal.SIGUSR2, signal.SIGUSR1])  # the second by SUBMITIT_PREEMPT_SIGNAL
def test_handlers_from_before_are_kept_and_put_back(number):
    def submitits(number, frame):
        raise AssertionError('only Run calls it')

    on_interrupt, before = signal.getsignal(signal.SIGINT), signal.signal(number, submitits)
    try:
        signals.install_early()
        signals.install()
        signals.install()
        signal.raise_signal(number)
        assert signals.requested() == signals.REQUEUE
        assert signals.requeue_handler() is submitits
        signals.restore()
        assert signal.getsignal(number) is submitits
        assert signal.getsignal(signal.SIGINT) is on_interrupt
        assert signals.requeue_handler() is None
    finally:
        signal.signal(number, before)


# --------------------------------------------------------------------------
# processes, with loader processes and under torchrun


@pytest.fixture(scope='module')
def undisturbed(images, tmp_path_factory):
    """The last checkpoint of a run that nobody interrupts."""
    return train('pretrain', images, tmp_path_factory.mktemp('whole'), *SHORT)


def test_sigterm_in_mid_epoch(images, undisturbed, tmp_path):
    """With loader workers, which get the signal too, and a second one while the first is being obeyed."""
    process = start_waiting(images, tmp_path, *SHORT, '--num_workers', '2', step=3)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    for pid in (*map(int, children), process.pid):
        os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 75
    assert len(children) == 2
    assert err == ''
    assert 'stopped on request at epoch 0, step ' in out.splitlines()[-1]
    assert load(tmp_path)['step'] == 4
    assert equal_states(train('pretrain', images, tmp_path, *SHORT, '--resume', 'auto'), undisturbed)


def test_sigterm_to_torchrun(images, undisturbed, tmp_path):
    """Both ranks stop at one step. One process that makes two forwards of each step goes on from there."""
    flags = [*SHORT, '--batch_size', '4']
    process = start_waiting(images, tmp_path, *flags, step=3, ranks=2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1  # torchrun's, whatever the ranks return
    assert out.count('stopped on request at epoch 0, step') == 1
    assert 4 <= load(tmp_path)['step'] <= 7  # where both had been asked, and met
    resumed = train('pretrain', images, tmp_path, *flags, '--accum_iter', '2', '--resume', 'auto')
    losses = [state['logger']['loss'][0] / state['logger']['loss'][1] for state in (resumed, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_ranks_stop_at_one_step_where_they_do_not_meet_after_each(images, tmp_path):
    """One rank of two is asked in the fourth step; they meet after the first, the third, and then the seventh."""
    flags = [*SHORT, '--batch_size', '4', '--print_freq', '100']
    done = run('pretrain', images, tmp_path, *flags, ranks=2, fault='stop:1:3')
    assert done.codes == [75, 75]
    step = load(tmp_path)['step']
    assert done.stdout.splitlines()[-1].startswith(f'stopped on request at epoch 0, step {step} of 8')
    assert 4 <= step <= 7  # earlier, where a step takes a quarter of a second


@pytest.mark.parametrize(
    ('slowest', 'expected'),
    [
        (0.01, [1, 3, 7, 15, 31, 63, 127, 227]),
        (0.3, [1, 3, 6, 9, 12]),
        (2.5, [1, 2, 3, 4]),
    ],
)
def test_how_often_ranks_meet(slowest, expected, monkeypatch):
    """About once a second by the slowest one's steps; here the other rank's are quicker."""
    clock = [0.0]
    monkeypatch.setattr(dist.time, 'monotonic', lambda: clock[0])
    monkeypatch.setattr(dist, 'active', lambda: True)
    monkeypatch.setattr(dist, 'largest_each', lambda number, us: [number, max(us, int(1e6 * slowest))])
    meetings, met = dist.Meetings(), []
    for step in range(1, expected[-1] + 1):
        clock[0] += slowest / 3
        if meetings.due():
            met.append(step)
            assert meetings.largest(signals.STOP) == signals.STOP
    assert met == expected


def test_no_rank_outlives_its_torchrun(images, tmp_path):
    """SIGKILL leaves torchrun no time to end its ranks."""
    line = command('pretrain', images, tmp_path, *SHORT, '--epochs', '500', ranks=1)
    process = start(line, TORCHELASTIC_RUN_ID='stand-in')
    read_until(process, '[3/8]')
    process.kill()
    wait_for_end(tmp_path)
    assert 'stopped on request at epoch' in process.stdout.read()


def test_no_rank_waits_without_its_torchrun(images, tmp_path):
    """It waits for another rank, which never comes, and obeys nothing that Python would have to do."""
    place = {'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_ADDR': '127.0.0.1'}
    place |= {'MASTER_PORT': str(free_port()), 'TORCHELASTIC_RUN_ID': 'stand-in'}
    process = start(command('pretrain', images, tmp_path, *SHORT, ranks=1), **place)
    while not (tmp_path / 'status.json').exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(1)
    process.kill()
    wait_for_end(tmp_path)  # not in 600 s


def wait_for_end(folder: Path) -> None:
    """Of the process that writes there."""
    pid = json.loads((folder / 'status.json').read_text())['pid']
    for _ in range(900):
        if not alive(pid):
            return
        time.sleep(0.1)
    pytest.fail(f'process {pid} is still there')


def test_a_launcher_that_is_gone_already():
    program = 'from util import signals; signals.end_with_launcher(launcher=0)'
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, timeout=60)
    assert done.returncode == (-signal.SIGTERM if sys.platform == 'linux' else 0)
