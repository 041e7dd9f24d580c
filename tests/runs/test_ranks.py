"""Lost ranks (dead or stuck), failing ranks, ranks that do not meet, and two runs in one folder."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from training import SHORT, Forked, command, free_port, load, processes_of, read_until, run, same, start, train

import engine_finetune
from util import errors, run_folder
from util.errors import DisagreementError, UserError
from util.optim import GuardedOptimizer
from util.run import Run
from util.run_folder import alive

FLAGS = [*SHORT, '--batch_size', '4', '--save_freq_steps', '2', '--dist_timeout', '5']  # 8 steps of 2 ranks an epoch

pytestmark = pytest.mark.xdist_group('ranks')  # one test process, so that `whole` is made once


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    """The last checkpoint of two ranks that nobody disturbs."""
    folder = tmp_path_factory.mktemp('whole')
    done = run('pretrain', images, folder, *FLAGS, ranks=2)
    assert done.returncode == 0, done.stderr
    return load(folder)


def start_ranks(images, folder, *flags: str, ranks: int = 2, torchrun: bool = True) -> subprocess.Popen | Forked:
    """Ranks under a launcher, in their sixth step."""
    process = start(command('pretrain', images, folder, *FLAGS, *flags, ranks=ranks, torchrun=torchrun))
    read_until(process, '[5/8]')
    return process


def error_lines(text: str) -> list[str]:
    return [
        line.partition(': error: ')[2] for line in text.splitlines() if line.startswith('main_pretrain.py: error: ')
    ]


@pytest.mark.promise(9)
@pytest.mark.fault(17, 18)
@pytest.mark.parametrize(
    ('number', 'words'),
    [
        (signal.SIGKILL, r'has died; its last sign was after step \d of epoch \d+'),
        pytest.param(
            signal.SIGSTOP,
            r'does not answer; its last sign was after step \d of epoch \d+; kill it if the launcher does not',
            marks=pytest.mark.faults,  # it waits for torchrun's half minute
        ),
    ],
)
def test_a_lost_rank_ends_the_run_and_is_named(number, words, images, whole, tmp_path, measured):
    process = start_ranks(images, tmp_path, '--epochs', '100', torchrun=number == signal.SIGSTOP)
    first, victim = (json.loads((tmp_path / '.ranks' / f'{rank}.json').read_text())['pid'] for rank in (0, 1))
    began = time.monotonic()
    os.kill(victim, number)
    # --dist_timeout, the ranks' wait for each other's word, torchrun's for a rank that hangs before it kills it, and
    # the starts and ends of processes, which take long on a busy machine
    _, err = process.communicate(timeout=5 + 5 + 30 + 110)
    seconds = time.monotonic() - began
    assert process.returncode == 1  # torchrun's, whatever its processes return
    assert len(error_lines(err)) == 1, err
    [line] = error_lines(err)
    assert re.fullmatch(rf'rank 0: epoch \d+, after \d of 8 steps: rank 1 \(host \S+, process {victim}\) {words}', line)
    status = json.loads((tmp_path / 'status.json').read_text())
    assert (status['state'], status['exit_code']) == ('failed', 6)
    assert line == f'rank 0: {status["message"]}'
    assert not processes_of(tmp_path)
    assert not alive(first)
    assert not alive(victim)

    if number == signal.SIGKILL:  # on from there, with the same bytes in the end as if nothing had been
        done = run('pretrain', images, tmp_path, *FLAGS, '--resume', 'auto', ranks=2)
        assert done.returncode == 0, done.stderr
        assert all(same(load(tmp_path)[key], whole[key]) for key in ('model', 'optimizer', 'logger'))
    measured(
        f'torchrun, {number.name} of rank 1: job over after {seconds:.1f} s (--dist_timeout 5), rank and step named'
    )


@pytest.mark.faults  # four ranks on two cores
def test_only_the_lost_one_of_four_is_named(images, tmp_path):
    """A rank that waits for one that has noticed must notice, too."""
    process = start_ranks(images, tmp_path, '--epochs', '100', '--batch_size', '2', '--dist_timeout', '300', ranks=4)
    os.kill(json.loads((tmp_path / '.ranks' / '1.json').read_text())['pid'], signal.SIGKILL)
    _, err = process.communicate(timeout=150)  # less than --dist_timeout
    lines = error_lines(err)
    assert 1 <= len(lines) <= 3
    assert all(re.search(r'rank 1 \(host \S+, process \d+\) has died; its last sign [^;]*$', line) for line in lines), (
        err
    )
    assert not processes_of(tmp_path)


@pytest.mark.fault(19)
def test_an_exception_on_one_rank(images, tmp_path):
    done = run('pretrain', images, tmp_path, *FLAGS, ranks=2, fault='raise:1:5')
    assert done.codes == [6, 1]
    assert len(re.findall('^IndexError: of rank 1 alone', done.stderr, re.MULTILINE)) == 1  # the end of one traceback
    [line] = [line for line in done.stderr.splitlines() if ': error: ' in line]
    assert line.endswith('rank 0: epoch 0, after 5 of 8 steps: rank 1 has failed: IndexError: of rank 1 alone')
    status = json.loads((tmp_path / 'status.json').read_text())
    assert (status['exit_code'], status['rank'], status['message']) == (1, 1, 'IndexError: of rank 1 alone')
    assert load(tmp_path)['step'] == 4


@pytest.mark.promise(9)
@pytest.mark.fault(17)
def test_a_rank_that_is_lost_while_hosts_wait_for_gpus(images, tmp_path):
    """A thread of each rank notices, and ends it."""
    done = run('pretrain', images, tmp_path, *FLAGS, '--dist_timeout', '300', ranks=2, fault='gpu:1:3')
    assert done.codes == [6, 9]
    [line] = [line for line in done.stderr.splitlines() if ': error: ' in line]
    assert re.search(
        r'rank 0: epoch 0, after 3 of 8 steps: rank 1 \(host \S+, process \d+\) has died; its last sign', line
    )
    assert json.loads((tmp_path / 'status.json').read_text())['exit_code'] == 6


@pytest.mark.faults
@pytest.mark.parametrize('fault', ['gpu:1:99', 'stop:1:3'])
def test_no_rank_is_missed_at_its_end(fault, images, tmp_path):
    """Ranks end one after the other, with threads that watch for lost ones."""
    done = run('pretrain', images, tmp_path, *FLAGS, ranks=2, fault=fault)
    assert (done.codes, done.stderr) == ([0, 0] if fault == 'gpu:1:99' else [75, 75], '')


def test_gradients_in_bf16(images, whole, tmp_path):
    """Other numbers than in float32, but near them."""
    done = run('pretrain', images, tmp_path, *FLAGS, '--bf16_gradients', ranks=2)
    assert done.returncode == 0, done.stderr
    losses = [state['logger']['loss'][0] / state['logger']['loss'][1] for state in (load(tmp_path), whole)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.promise(13)
@pytest.mark.fault(16)
def test_one_writer_per_folder(images, tmp_path, measured):
    flags = ['--batch_size', '8', '--warmup_epochs', '1', '--epochs', '100']
    first = start(command('pretrain', images, tmp_path, *flags))
    read_until(first, '[3/8]')
    second = run('pretrain', images, tmp_path, *flags, '--resume', 'auto')
    assert second.returncode == 2
    [line] = error_lines(second.stderr)
    assert re.search(rf'another run writes to \S+ \(host \S+, pid {first.pid}\)', line)
    read_until(first, 'Epoch: [1]')  # it goes on undisturbed
    first.kill()
    first.communicate()
    status = json.loads((tmp_path / 'status.json').read_text())
    assert (status['state'], status['pid']) == ('running', first.pid)
    epochs = load(tmp_path)['epoch'] + 2  # the lock has died with its process
    train('pretrain', images, tmp_path, *flags, '--epochs', epochs, '--resume', 'auto')
    measured('two processes on one folder: 1 runs, 1 ends with exit code 2 and names the other')


def remove(lock: Path) -> None:
    lock.unlink()


def replace(lock: Path) -> None:
    lock.unlink()
    lock.touch()


def replace_folder(lock: Path) -> None:
    shutil.rmtree(lock.parent)
    lock.parent.mkdir()
    lock.touch()


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ('change', 'when'),
    [(remove, 'first step'), (replace, 'evaluation'), (replace_folder, 'first step')],
)
def test_a_lock_that_is_lost(change, when, images, tmp_path, monkeypatch):
    """Another run may write there. This one ends at its next save, and writes nothing, its end neither."""
    owner, name = {'first step': (GuardedOptimizer, 'step'), 'evaluation': (engine_finetune.F, 'cross_entropy')}[when]
    original, written = getattr(owner, name), {}

    def lose(*args, **kwargs):
        if not written:
            change(tmp_path / 'run' / '.lock')
            written.update(contents(tmp_path / 'run'))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, lose)
    flags = [*SHORT, '--batch_size', '32', '--print_freq', '100', '--log_dir', tmp_path / 'log']
    with pytest.raises(UserError, match=r'run/\.lock was removed or replaced while this run had it'):
        train('finetune', images, tmp_path / 'run', *flags)
    assert contents(tmp_path / 'run') == written


def contents(folder: Path) -> dict[Path, bytes]:
    """Checkpoints, log.txt, args.json, status.json."""
    return {path: path.read_bytes() for path in folder.glob('[!.]*') if path.name != 'console.txt'}


def test_a_file_system_without_locks(images, tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(run_folder.fcntl, 'lockf', cannot)
    lose = lambda *_: (tmp_path / '.lock').unlink(missing_ok=True)  # noqa: E731
    monkeypatch.setattr(Run, 'announce', lose)
    train('pretrain', images, tmp_path, *SHORT, '--batch_size', '32', '--epochs', '1', '--warmup_epochs', '0')


@pytest.mark.parametrize(
    ('error', 'lines'),
    [
        (UserError('of rank 3 alone'), ['error: rank 3: of rank 3 alone']),
        (DisagreementError('of all ranks'), []),
    ],
)
def test_what_the_first_rank_of_a_machine_does_not_say(error, lines, monkeypatch, capsys):
    """Before the ranks have met, nobody knows whether a mistake is one rank's alone."""
    for name, value in {'RANK': '3', 'WORLD_SIZE': '4', 'LOCAL_RANK': '1'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(errors, 'FIRST_S', 0)

    def fail():
        raise error

    with pytest.raises(SystemExit) as caught:
        errors.run_main(fail)
    assert caught.value.code == 2
    assert [line.partition(': ')[2] for line in capsys.readouterr().err.splitlines()] == lines


@pytest.mark.fault(25)
def test_a_port_in_use(images, tmp_path):
    with socket.socket() as holder:
        holder.bind(('127.0.0.1', 0))
        holder.listen()
        port = holder.getsockname()[1]
        place = {
            'RANK': '0',
            'WORLD_SIZE': '2',
            'LOCAL_RANK': '0',
            'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(port),
        }
        line = command('pretrain', images, tmp_path, *FLAGS)
        process = start(line, **place)
        _, err = process.communicate(timeout=150)
    assert process.returncode == 2
    [line] = error_lines(err)
    assert f'the port of 127.0.0.1:{port}, where the processes meet, is in use' in line


def test_a_rank_that_never_comes(images, tmp_path):
    place = {'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_ADDR': '127.0.0.1'}
    line = command('pretrain', images, tmp_path, *FLAGS, '--dist_timeout', '2')
    process = start(line, MASTER_PORT=str(free_port()), **place)
    _, err = process.communicate(timeout=150)
    assert process.returncode == 6
    [line] = error_lines(err)
    assert 'rank 0 of 2 did not find the others at 127.0.0.1:' in line
