"""Requests to stop at any moment of a run: it saves, ends with exit code 75, and goes on to the same bytes."""

import errno
import json
import signal

import pytest
from training import SHORT, equal_states, load, train

import engine_finetune
import main_finetune
from util import checkpoint
from util.data import datasets
from util.errors import StorageError
from util.optim import GuardedStep
from util.run import Run

FLAGS = [*SHORT, '--batch_size', '16']  # 4 steps an epoch
MOMENTS = {  # what is running when the signal comes, and where the run is to stop: epoch and step
    'before the first step': (Run, 'announce', 1, (0, 0)),
    'while the loader starts': (datasets, 'loader', 1, (0, 0)),
    'in a step': (GuardedStep, 'backward', 2, (0, 2)),
    'in a save': (checkpoint, 'write', 1, (0, 4)),  # of an epoch that is still to be evaluated
    'in an evaluation': (engine_finetune.F, 'cross_entropy', 1, (1, 0)),
}


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    return train('finetune', images, tmp_path_factory.mktemp('whole'), *FLAGS)


@pytest.fixture(autouse=True)
def handlers():
    """A run that has stopped is deaf to signals; this process shall not be."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
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
def test_a_request_at_any_moment(moment, name, images, whole, tmp_path, monkeypatch, capfd):
    owner, function, call, place = MOMENTS[moment]
    with monkeypatch.context() as patch:
        signal_at(patch, owner, function, call, getattr(signal, name))
        where = stopped_at(images, tmp_path, capfd)
    assert where == place
    if name == 'SIGTERM' or moment == 'in a step':
        resumed = train('finetune', images, tmp_path, *FLAGS, '--resume', 'auto')
        assert equal_states(resumed, whole)


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
        signal_at(patch, GuardedStep, 'backward', 2, signal.SIGTERM)
        patch.setattr(checkpoint, 'write', no_space)
        with pytest.raises(StorageError):
            train('finetune', images, tmp_path, *FLAGS)
    status = json.loads((tmp_path / 'status.json').read_text())
    assert (status['state'], status['exit_code']) == ('failed', 5)


@pytest.mark.fault(21)
def test_again_during_the_save(images, whole, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        signal_at(patch, GuardedStep, 'backward', 3, signal.SIGTERM)
        signal_at(patch, checkpoint, 'write', 1, signal.SIGTERM, signal.SIGTERM)
        where = stopped_at(images, tmp_path, capfd)
    assert where == (0, 3)
    resumed = train('finetune', images, tmp_path, *FLAGS, '--resume', 'auto')
    assert equal_states(resumed, whole)


@pytest.mark.fault(22)
def test_sigterm_while_sigusr2_is_obeyed(images, whole, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        signal_at(patch, GuardedStep, 'backward', 3, signal.SIGUSR2)
        signal_at(patch, main_finetune.dist, 'barrier', 1, signal.SIGTERM)
        where = stopped_at(images, tmp_path, capfd)
    assert where == (0, 3)
    resumed = train('finetune', images, tmp_path, *FLAGS, '--resume', 'auto')
    assert equal_states(resumed, whole)
