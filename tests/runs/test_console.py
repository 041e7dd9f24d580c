"""What is printed: it never ends a run, costs no state, changes no exit code, and is kept in console.txt."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from training import ROOT, SHORT, train

import main_finetune
import main_pretrain
from scripts import replay_step, visualize
from util import console
from util.errors import UserError, run_main

FLAGS = [*SHORT, '--batch_size', '32', '--epochs', '1', '--warmup_epochs', '0']  # 2 steps


def lost(*_):
    raise OSError(5, 'Input/output error')


@contextlib.contextmanager
def broken(case: str):
    """A stream that cannot be printed to."""
    if case == 'none':
        yield None
    elif case == 'a lost terminal':
        yield SimpleNamespace(write=lost, flush=lost, fileno=lost, isatty=lambda: True)
    else:
        with open(os.devnull, 'w', encoding='ascii') as stream:
            yield stream


@pytest.mark.fault(40)
@pytest.mark.parametrize('case', ['a lost terminal', 'none', 'ASCII'])
def test_a_line_that_cannot_be_printed(case, images, tmp_path, monkeypatch):
    """The run ends as it would have; its lines are in console.txt, those of a resumed run behind a line of its own."""
    folder = tmp_path / 'läuft'
    with broken(case) as out, broken(case) as err, monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', out)
        patch.setattr(sys, 'stderr', err)
        run_main(lambda: train('pretrain', images, folder, *FLAGS))
        with pytest.raises(SystemExit) as caught:
            run_main(lambda: train('pretrain', images, folder, *FLAGS))
    assert caught.value.code == 2
    lines = (folder / 'console.txt').read_text(encoding='utf-8').splitlines()
    assert [line.partition(', host ')[2].split()[2:3] for line in lines if line[0] == '#'] == [[f'{os.getpid()}:']]
    assert [line[:16] for line in lines if line.startswith('Epoch')] == ['Epoch: [0] [1/2]', 'Epoch: [0] [2/2]']
    assert lines[-2].endswith(f'events are in {folder}')
    assert 'error: ' in lines[-1]


@pytest.mark.fault(40)
@pytest.mark.parametrize('streams', ['>/dev/full', '2>/dev/full', '>&-', '2>&-', '<&- >&- 2>&-', '| true'])
@pytest.mark.parametrize('code', [0, 2])
def test_exit_codes_stay(streams, code):
    """Python itself would end with 120 where it cannot empty a buffer."""
    ends = {0: 'None', 2: 'fail(UserError("no"))'}
    program = f"""
from util.console import say
from util.errors import UserError, run_main
def fail(error): raise error
run_main(lambda: (say('ä \\udcff'), {ends[code]}))
"""
    line = f'set -o pipefail; {sys.executable} -c "$PROGRAM" {streams}'
    env = os.environ | {'PROGRAM': program, 'PYTHONIOENCODING': 'ascii', 'PYTHONUNBUFFERED': ''}
    assert subprocess.run(['bash', '-c', line], cwd=ROOT, env=env, timeout=60).returncode == code


def test_a_resumed_run_is_appended(images, tmp_path, capfd):
    train('pretrain', images, tmp_path, *FLAGS)
    train('pretrain', images, tmp_path, *FLAGS, '--epochs', '2', '--resume', 'auto')
    text = (tmp_path / 'console.txt').read_text()
    said = ''.join(line for line in text.splitlines(keepends=True) if line[0] != '#')
    assert (text.count('\n# '), said) == (1, capfd.readouterr().out)


def test_progress_on_a_terminal(monkeypatch, tmp_path, capsys):
    """One line overwrites the other; in the file each stays, at its full length."""
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    monkeypatch.setenv('COLUMNS', '11')
    console.keep_in(tmp_path / 'console.txt', '# begins')
    for number in range(3):
        console.say(f'progress {number}/2', fleeting=number < 2)
    assert capsys.readouterr().out == '\r\x1b[Kprogress 0\r\x1b[Kprogress 1\r\x1b[Kprogress 2/2\n'
    kept = (tmp_path / 'console.txt').read_text().splitlines()
    assert kept == ['# begins', 'progress 0/2', 'progress 1/2', 'progress 2/2']


def test_a_folder_that_tensorboard_cannot_write_to(images, tmp_path):
    folder = tmp_path / os.fsdecode(b'b\xe4d')
    with pytest.raises(UserError, match='give another --log_dir'):
        train('pretrain', images, folder, *FLAGS)
    train('pretrain', images, folder, *FLAGS, '--log_dir', tmp_path / 'log')
    assert 'b\\udce4d' in (folder / 'console.txt').read_text().splitlines()[-1]


@pytest.mark.parametrize('program', [main_pretrain, main_finetune, visualize, replay_step])
def test_programs_without_docstrings(program, monkeypatch):
    """As under PYTHONOPTIMIZE=2."""
    monkeypatch.setattr(program, '__doc__', None)
    assert program.get_args_parser().description == ''
