"""The programs of a comparison: their order, their ends, and what stops them."""

import errno
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from util import digests
from util.comparison import jobs
from util.comparison.jobs import Job, Outcome, outcomes
from util.errors import STOPPED, StorageError, UserError
from util.run_folder import alive, wait_until

SAVES = 'import signal, sys; signal.signal(15, lambda *_: (time.sleep({}), print("saved"), sys.exit(75)))'
DEAF = 'import signal; signal.signal(15, signal.SIG_IGN)'
WAITS = 'open(name, "w").write(str(os.getpid())); os.rename(name, name + ".pid"); time.sleep(60); os._exit(0)'


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """The programs run in a folder of the test."""
    monkeypatch.setattr(jobs, 'LOOK_S', 0.01)
    monkeypatch.chdir(tmp_path)


def python(*code: str) -> list[str]:
    return [sys.executable, '-I', '-S', '-c', '\n'.join(['import os, time', *code])]


def run(tasks: list[Job], folder: Path, at_once: int = 2) -> dict[str, Outcome]:
    return jobs.run(tasks, folder / 'runs', at_once, lambda slot: {'SLOT': str(slot)})


def states(found: dict[str, Outcome]) -> dict[str, str]:
    return {name: outcome.state for name, outcome in found.items()}


def test_slots(tmp_path, capfd):
    """Two at once, each alone in its slot; and what needs others runs after them."""
    note = 'print(os.environ["SLOT"], {!r}, file=open("order", "a"), flush=True)'
    work = [note.format('begins'), 'time.sleep(0.05)', note.format('ends')]
    meet = [
        'open(f"{os.getpid()}.here", "w")',
        'while sum(n.endswith(".here") for n in os.listdir()) < 2: time.sleep(0.01)',
    ]
    tasks = [Job(f'first/{i}', python(*meet, *work)) for i in range(2)]
    tasks += [
        Job('middle', python('time.sleep(0.3)', *work)),
        Job('last', python('print(open("order").read())'), ('first/0', 'middle')),
    ]
    assert set(states(run(tasks, tmp_path)).values()) == {'done'}
    busy, most = set(), 0
    for line in (tmp_path / 'order').read_text().splitlines():
        slot, what = line.split()
        assert (slot in busy) == (what == 'ends')
        busy ^= {slot}
        most = max(most, len(busy))
    assert most == 2
    assert (tmp_path / 'runs/last/job.txt').read_text().count('ends') == 3
    assert capfd.readouterr().out.splitlines()[-1] == '4 of 4: last done in 0 s'


def test_a_failure_ends_only_what_needs_it(tmp_path, capfd):
    """It says why, and is run again in the next call; what is done is not."""
    ends = {
        'line': (['raise SystemExit("a.py: error: no such folder\\nlater")'], 'failed', 'no such folder'),
        'bug': (['raise ValueError(3)'], 'failed', 'exit code 1, after ValueError: 3'),
        'silent': (['raise SystemExit(3)'], 'failed', 'exit code 3'),
        'killed': (['os.kill(os.getpid(), 9)'], 'failed', 'died by SIGKILL (by the system, if memory is used up: '),
        'saved': (['raise SystemExit(75)'], 'stopped', ''),
        'terminated': (['os.kill(os.getpid(), 15)'], 'stopped', ''),
        'good': (['print("again")'], 'done', ''),
        'late': (['open("late") if os.path.exists("late") else open("late", "x").no'], 'failed', 'exit code 1, after '),
    }
    tasks = [Job(name, python(*code)) for name, (code, _, _) in ends.items()]
    tasks += [Job('missing', ['no_such_program']), Job('needs', python(), ('good', 'bug'))]
    tasks += [Job('needs/that', python(), ('needs',)), Job('needs/saved', python(), ('saved',))]
    tasks += [Job('needs/good', python(), ('good',))]
    found = run(tasks, tmp_path)
    for name, (_, state, why) in ends.items():
        assert found[name].state == state
        assert found[name].why == why or (why.endswith(' ') and found[name].why.startswith(why))
    assert found['missing'].why == "cannot be started: [Errno 2] No such file or directory: 'no_such_program'"
    assert found['needs'] == found['needs/that'] == Outcome('not run', 'needs bug, which failed')
    assert found['needs/saved'] == Outcome('not run', 'needs saved, which was stopped')
    assert found['needs/good'].state == 'done'
    assert 'bug FAILED after 0 s: exit code 1, after ValueError: 3; time left: not known yet' in capfd.readouterr().out
    assert outcomes(tasks, tmp_path / 'runs') == found

    again = run(tasks, tmp_path)
    assert states(again) == states(found) | {'late': 'done'}
    assert (tmp_path / 'runs/good/job.txt').read_text().count('again\n') == 1
    assert again['good'] == found['good']
    assert again['silent'].seconds > found['silent'].seconds
    assert again['silent'].cpu_s > found['silent'].cpu_s


def test_what_is_done_is_not_run_again(tmp_path, capfd):
    tasks = [Job('a', python('print("ran")')), Job('b', python(), ('a',))]
    run(tasks, tmp_path)
    capfd.readouterr()
    assert states(run(tasks, tmp_path)) == {'a': 'done', 'b': 'done'}
    assert run([], tmp_path) == {}
    said = capfd.readouterr().out.splitlines()
    assert said == ['nothing to run: 2 of 2 jobs are done', 'nothing to run: 0 of 0 jobs are done']
    other = [tasks[0]._replace(command=python('print("ran", 2)')), tasks[1]]
    assert states(outcomes(other, tmp_path / 'runs')) == {'b': 'done'}
    assert states(run(other, tmp_path)) == {'a': 'done', 'b': 'done'}
    assert [line for line in (tmp_path / 'runs/a/job.txt').read_text().splitlines() if line[0] != '#'] == [
        'ran',
        'ran 2',
    ]


def test_a_program_of_the_repository(tmp_path, monkeypatch):
    """It runs where the user is; words that may differ from call to call come last, and run nothing again."""
    (tmp_path / 'code').mkdir()
    (tmp_path / 'code/program.py').write_text('import os, sys; print(sys.executable, os.getcwd(), *sys.argv)')
    monkeypatch.setattr(jobs, 'ROOT', tmp_path / 'code')
    assert run([Job('a', ['program.py', '--flag'], how=('--device', 'cpu'))], tmp_path)['a'].state == 'done'
    printed = (tmp_path / 'runs/a/job.txt').read_text().splitlines()
    assert printed[0].endswith(': program.py --flag --device cpu')
    assert printed[1] == f'{sys.executable} {tmp_path} {tmp_path}/code/program.py --flag --device cpu'
    run([Job('a', ['program.py', '--flag'], how=('--device', 'cuda'))], tmp_path)
    assert (tmp_path / 'runs/a/job.txt').read_text().splitlines() == printed


def test_what_it_took(tmp_path):
    """With the processes of the process."""
    burn = 'while time.process_time() < 0.2: pass'
    found = run([Job('a', python('if os.fork(): os.wait()', f'else:\n  {burn}'))], tmp_path)['a']
    assert 0.2 <= found.cpu_s < 2
    assert 0.2 <= found.seconds < 20
    assert found.peak_bytes > 1e7


def begin(tasks: list[Job], folder: Path) -> multiprocessing.Process:
    """A call in another process, of which each job's process has begun."""
    process = multiprocessing.get_context('fork').Process(target=run, args=(tasks, folder))
    process.start()
    wait_until(lambda: all((folder / f'{job.name}.pid').exists() for job in tasks), 20)
    return process


def ended(folder: Path, name: str) -> bool:
    return not alive(int((folder / f'{name}.pid').read_text()))


def exit_code(process: multiprocessing.Process) -> int | None:
    process.join(20)
    return process.exitcode


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop(number, tmp_path):
    tasks = [Job('a', python(SAVES.format(0), 'name = "a"', WAITS)), Job('b', python('name = "b"', WAITS))]
    process = begin(tasks, tmp_path)
    os.kill(process.pid, number)
    assert exit_code(process) == STOPPED
    assert states(outcomes(tasks, tmp_path / 'runs')) == {'a': 'stopped', 'b': 'stopped'}
    assert (tmp_path / 'runs/a/job.txt').read_text().endswith('saved\n')


def test_what_does_not_stop_is_killed(tmp_path, monkeypatch):
    """With its own processes; after a while, or at the second Ctrl-C."""
    tasks = [Job('a', python(DEAF, 'name = "a" if os.fork() else "forked"', WAITS))]
    process = begin(tasks, tmp_path)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert not ended(tmp_path, 'a')
    os.kill(process.pid, signal.SIGINT)
    assert exit_code(process) == 1  # multiprocessing's, of a KeyboardInterrupt
    assert ended(tmp_path, 'a')
    wait_until(lambda: ended(tmp_path, 'forked'), 5)
    assert ended(tmp_path, 'forked')

    monkeypatch.setattr(jobs, 'END_S', 0.2)
    (tmp_path / 'a.pid').unlink()
    process = begin(tasks, tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    assert exit_code(process) == STOPPED
    assert ended(tmp_path, 'a')


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux alone ends the programs')
def test_killed(tmp_path, capfd):
    """Its programs save and end; the next call waits for that. While they run, no other call runs any."""
    tasks = [Job('a', python(SAVES.format(0.3), 'name = "a"', WAITS))]
    process = begin(tasks, tmp_path)
    with pytest.raises(UserError, match=f'another comparison writes to .*runs .host .*, process {process.pid}.; '):
        run(tasks, tmp_path)
    process.kill()
    process.join()
    assert not ended(tmp_path, 'a')
    assert run([Job('b', python())], tmp_path)['b'].state == 'done'
    assert ended(tmp_path, 'a')
    assert (tmp_path / 'runs/a/job.txt').read_text().endswith('saved\n')
    assert capfd.readouterr().out.startswith('a comparison in this folder was killed; waiting for its programs')


def test_a_full_disk(tmp_path, monkeypatch):
    """One line, and what runs is ended."""

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(digests, 'replace', full)
    ready = 'while not os.path.exists("b.pid"): time.sleep(0.01)'
    with pytest.raises(StorageError, match=r'^cannot write .*/runs/./job.json: No space left on device$'):
        run([Job('a', python(ready)), Job('b', python('name = "b"', WAITS))], tmp_path)
    wait_until(lambda: ended(tmp_path, 'b'), 5)
    assert ended(tmp_path, 'b')


def test_time_left(tmp_path, monkeypatch):
    """All that is left by all slots, or the longest chain by one; `share` says what of a job is done already."""
    tasks = [Job('a', [], cost=100), Job('b', [], cost=100, share=lambda: 0.75), Job('c', [], cost=100)]
    tasks += [Job('d', [], cost=300), Job('e', [], ('d',), 300)]
    queue = jobs.Queue(tasks, tmp_path, 4, dict, None)
    assert queue.time_left() == 'time left: not known yet'
    queue.running['b'] = jobs.Running(tasks[1], 0, None, tmp_path, 0, 0.5, time.monotonic() - 60)
    assert queue.time_left() == 'about 24 min left'  # 25 in a minute: the chain of 600
    queue.ended |= {'a': Outcome('done'), 'd': Outcome('failed'), 'e': Outcome('not run')}
    queue.cost, queue.seconds = 275, 60  # now 300 in two minutes: c in one slot
    assert queue.time_left() == 'about 40 s left'
    queue.running['c'] = jobs.Running(tasks[2], 1, None, tmp_path, 0, 0, time.monotonic() - 30)  # 75 by that speed
    assert queue.time_left() == 'about 10 s left'
    queue.at_once = 1
    assert queue.time_left() == 'about 20 s left'


def test_what_a_program_leaves_behind_is_ended(tmp_path):
    left = ['name = "left"', f'if not os.fork(): {WAITS}', 'while not os.path.exists("left.pid"): time.sleep(0.01)']
    assert run([Job('a', python(*left))], tmp_path)['a'].state == 'done'
    wait_until(lambda: ended(tmp_path, 'left'), 5)
    assert ended(tmp_path, 'left')


def test_told_once_a_minute(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(jobs, 'TOLD_EVERY', 0.05)
    run([Job('a', python('time.sleep(0.2)'), cost=1)], tmp_path)
    assert '0 of 1: a running; time left: not known yet\n' in capfd.readouterr().out
    assert jobs.spoken(59) == '59 s'
    assert jobs.spoken(126) == '2.1 min'
    assert jobs.spoken(40 * 3600) == '40 h'
