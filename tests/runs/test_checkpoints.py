"""Checkpoint files under kills, full disks and damage: what is found again is whole, and the newest that there is."""

import contextlib
import copy
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import threading
import time
import zlib

import pytest
import torch
from training import equal_states, load, same, train

from util import build, checkpoint, digests, resources
from util.errors import CheckpointError, DamagedError, NoCheckpointError, StorageError, UserError
from util.weights import read_checkpoint

FLAGS = ['--batch_size', '16', '--epochs', '2', '--warmup_epochs', '0', '--save_freq_steps', '2']


def state(epoch: int, step: int = 0, size: int = 1000) -> dict:
    return {'epoch': epoch, 'step': step, 'model': {'weight': torch.full((size,), float(epoch))}}


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    """A run's folder: last, previous and numbered checkpoints."""
    folder = tmp_path_factory.mktemp('trained')
    train('pretrain', images, folder / 'run', *FLAGS, '--save_freq', '1')
    return folder


def sum_of(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_sums_lie_beside_every_checkpoint(trained):
    files = checkpoint.any_in(trained / 'run')
    assert [file.name for file in files] == [f'checkpoint-{name}.pth' for name in ('0', '1', 'last', 'previous')]
    for file in files:
        assert digests.beside(file).read_text() == f'{sum_of(file)}  {file.name}\n'
    done = subprocess.run(
        ['sha256sum', '--check', *(f'{file.name}.sha256' for file in files)],
        capture_output=True,
        cwd=trained / 'run',
        check=False,
    )
    assert done.returncode == 0, done.stdout
    last, previous = (load(trained / 'run', name) for name in (checkpoint.LAST, checkpoint.PREVIOUS))
    assert [(s['epoch'], s['step']) for s in (previous, last)] == [(1, 2), (1, 4)]


@pytest.mark.promise(5)
def test_any_damage_is_noticed(tmp_path, measured):
    """Truncations and single flipped bits at random places."""
    path = tmp_path / checkpoint.LAST
    checkpoint.save(path, state(0))
    content, rng, noticed = path.read_bytes(), random.Random(0), 0
    for i in range(500):
        damaged = bytearray(content)
        place = rng.randrange(len(content))
        if i % 2:
            damaged[place] ^= 1 << rng.randrange(8)
        else:
            del damaged[place:]
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r'is empty|is damaged: its SHA-256 is not the one in|not a checkpoint'):
            read_checkpoint(path)
        noticed += 1
    path.write_bytes(content)
    read_checkpoint(path)
    measured(f'{noticed} of 500 random truncations and flipped bits noticed')


DAMAGES = {
    'empty file': lambda content: b'',
    'last 100 bytes missing': lambda content: content[:-100],
    'one flipped bit': lambda content: content[:50000] + bytes([content[50000] ^ 1]) + content[50001:],
}


def test_a_file_is_read_once(tmp_path, monkeypatch):
    """Its sum is made of the bytes that become tensors; the checksums in it are for files without a sum."""
    checkpoint.save(tmp_path / 'a.pth', state(1, size=10**6))
    sizes, checksums, readinto, crc32 = [], [], digests.SummedBytes.readinto, zlib.crc32

    def counted(file, buffer):
        sizes.append(readinto(file, buffer))
        return sizes[-1]

    monkeypatch.setattr(digests.SummedBytes, 'readinto', counted)
    monkeypatch.setattr(digests, 'sum_of', None)
    monkeypatch.setattr(zlib, 'crc32', lambda data, *before: checksums.append(len(data)) or crc32(data, *before))
    digests.known_sums.clear()
    for with_sum in (True, False):
        read = read_checkpoint(tmp_path / 'a.pth')
        assert same(read, state(1, size=10**6))
        assert sum(sizes) == (tmp_path / 'a.pth').stat().st_size
        assert (sum(checksums) >= 4 * 10**6) != with_sum
        sizes.clear()
        if with_sum:  # what is known already is not made again
            assert digests.good_sum(tmp_path / 'a.pth') == sum_of(tmp_path / 'a.pth')
            digests.beside(tmp_path / 'a.pth').unlink()


@pytest.mark.fault(1, 2, 3)
@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_falls_back_to_the_newest_good_one(damage, images, trained, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(build, 'check_forward', None)  # what has trained is not tried again
    run = shutil.copytree(trained / 'run', tmp_path / 'run')
    whole = load(run)
    for name in (checkpoint.LAST, 'checkpoint-1.pth'):  # the previous one, of epoch 1, step 2, is newer than number 0
        (run / name).write_bytes(damage((run / name).read_bytes()))
    resumed = train('pretrain', images, run, *FLAGS, '--resume', 'auto')
    out = capfd.readouterr().out
    [warning] = [line for line in out.splitlines() if line.startswith('WARNING: ') and 'put aside' in line][:1]
    assert 'checkpoint-last.pth is' in warning
    assert 'checkpoint-previous.pth at epoch 1, step 2 of 4' in out
    assert (run / 'checkpoint-last.pth.damaged').exists()
    assert same(resumed['model'], whole['model'])


@pytest.mark.fault(2)
def test_nothing_left_to_resume(images, trained, tmp_path):
    run = shutil.copytree(trained / 'run', tmp_path / 'run')
    for path in checkpoint.any_in(run):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(NoCheckpointError, match=r'none of the checkpoints in .* can be read') as caught:
        train('pretrain', images, run, *FLAGS, '--resume', 'auto')
    assert caught.value.code == 4
    assert len(checkpoint.any_in(run)) == 4


def test_another_way_from_an_earlier_checkpoint(images, trained, tmp_path, capfd):
    """What was written after it is put aside, and is not taken for newer than what comes now."""
    run = shutil.copytree(trained / 'run', tmp_path / 'run')
    flags = [*FLAGS, '--save_freq', '1', '--keep_last', '1']
    train('pretrain', images, run, *flags, '--resume', run / 'checkpoint-0.pth', '--lr', '1e-5')
    out = capfd.readouterr().out
    assert out.count('put aside, as later than') == 3
    assert (run / 'checkpoint-1.pth.abandoned').exists()
    kept = {path.name for path in checkpoint.any_in(run)}
    assert kept == {'checkpoint-0.pth', 'checkpoint-1.pth', checkpoint.LAST, checkpoint.PREVIOUS}
    assert load(run, 'checkpoint-1.pth')['args']['lr'] == 1e-5


def test_the_same_way_from_the_last_checkpoint(images, trained, tmp_path):
    """By its path: nothing is later, nothing is put aside."""
    run = shutil.copytree(trained / 'run', tmp_path / 'run')
    train('pretrain', images, run, *FLAGS, '--resume', run / checkpoint.LAST, '--epochs', '3')
    assert not list(run.glob('*.abandoned*'))


def test_two_other_ways(images, trained, tmp_path):
    """What the first had put aside stays."""
    run = shutil.copytree(trained / 'run', tmp_path / 'run')
    first = (run / checkpoint.LAST).read_bytes()
    for _ in range(2):
        train('pretrain', images, run, *FLAGS, '--resume', run / 'checkpoint-0.pth')
    assert (run / 'checkpoint-last.pth.abandoned').read_bytes() == first
    assert (run / 'checkpoint-last.pth.abandoned1').exists()


def test_another_runs_folder(images, trained, tmp_path):
    """Whatever is resumed, checkpoints of another run are not written over."""
    for name in (checkpoint.BEST, checkpoint.LAST):
        other = tmp_path / name.partition('.')[0]
        other.mkdir()
        shutil.copy(trained / 'run' / checkpoint.LAST, other / name)
        resume = 'auto' if name == checkpoint.BEST else trained / 'run' / checkpoint.LAST
        with pytest.raises(UserError, match='belongs to an earlier run'):
            train('pretrain', images, other, *FLAGS, '--resume', resume)


def test_a_passing_fault_is_no_damage(images, trained, tmp_path, monkeypatch):
    """A file system that does not answer for a moment: nothing is put aside."""
    run = shutil.copytree(trained / 'run', tmp_path / 'run')

    def stale(file, buffer):
        raise OSError(errno.ESTALE, 'Stale file handle')

    with monkeypatch.context() as patch:
        patch.setattr(digests.SummedBytes, 'readinto', stale)
        with pytest.raises(CheckpointError, match=r'checkpoint-last\.pth cannot be read: Stale file handle'):
            train('pretrain', images, run, *FLAGS, '--resume', 'auto')
    assert not list(run.glob('*.damaged'))
    train('pretrain', images, run, *FLAGS, '--resume', 'auto')


@pytest.mark.fault(10)
def test_only_leftovers(images, trained, tmp_path, capfd):
    (tmp_path / '.checkpoint-last.pth.77.tmp').write_bytes(b'half a checkpoint')
    train('pretrain', images, tmp_path, *FLAGS, '--resume', 'auto')
    out = capfd.readouterr().out
    assert f'no checkpoint in {tmp_path} to resume: this is a new run\n' in out
    assert 'removed 1 unfinished files' in out
    assert not list(tmp_path.glob('.checkpoint*'))


@pytest.mark.fault(12)
def test_other_settings_are_told(images, trained, tmp_path, capfd, monkeypatch):
    run = shutil.copytree(trained / 'run', tmp_path / 'run')
    (run / checkpoint.LAST).unlink()
    (run / 'checkpoint-1.pth').unlink()
    tried, check = [], build.check_forward
    monkeypatch.setattr(build, 'check_forward', lambda *args: tried.append(check(*args)))
    train('pretrain', images, run, *FLAGS, '--resume', 'auto', '--lr', '2e-3', '--hflip', '0', '--epochs', '3')
    assert tried == [None]
    [line] = [line for line in capfd.readouterr().out.splitlines() if 'other settings' in line]
    assert line.endswith('from here on: --epochs 2 then, 3 now; --hflip 0.5 then, 0.0 now; --lr None then, 0.002 now')
    with pytest.raises(CheckpointError, match='effective_batch: 16 then, 8 now'):
        train('pretrain', images, run, *FLAGS, '--resume', 'auto', '--batch_size', '8')


@pytest.mark.fault(9, 11)
def test_what_cannot_be_resumed(images, trained, tmp_path):
    """Before anything is started: no process group, no model."""
    (tmp_path / 'folder').mkdir()
    newer = load(trained / 'run') | {'schema': checkpoint.SCHEMA + 1}
    torch.save(newer, tmp_path / 'newer.pth')
    for name, words in (
        ('nowhere.pth', 'does not exist'),
        ('folder', 'is a folder, not a checkpoint'),
        ('newer.pth', r'is of a newer version of this program \(schema 2; this one knows 1\): update it'),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            train('pretrain', images, tmp_path / 'out', *FLAGS, '--resume', tmp_path / name)
        assert caught.value.code == 2


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / 'checkpoint-last.pth', {'epoch': 1})

    def torn(state, file):
        file.write(b'half a checkp')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', torn)
    with pytest.raises(StorageError, match=r'No space left on device; checkpoint-last\.pth of before is intact'):
        checkpoint.save(tmp_path / 'checkpoint-last.pth', {'epoch': 2})
    assert load(tmp_path) == {'epoch': 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ['checkpoint-last.pth', 'checkpoint-last.pth.sha256']


# --------------------------------------------------------------------------
# a kill between any two steps of a save


class Killed(BaseException):
    pass


def test_a_kill_between_any_two_system_calls(tmp_path, monkeypatch):
    """Whatever `save` has done by then, the folder holds the old state or the new, and its sum agrees."""
    calls = 0

    def count(original):
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == last:
                raise Killed
            return original(*args, **kwargs)

        return counted

    for last in range(1, 100):
        folder = tmp_path / str(last)
        folder.mkdir()
        for epoch in range(3):
            checkpoint.save(folder / checkpoint.LAST, state(epoch))
        calls, killed = 0, False
        with monkeypatch.context() as patch:
            for name in ('replace', 'fsync', 'link', 'open'):
                patch.setattr(os, name, count(getattr(os, name)))
            patch.setattr(torch, 'save', count(torch.save))
            try:
                checkpoint.save(folder / checkpoint.LAST, state(3))
            except Killed:
                killed = True
        found, saved, damaged = checkpoint.find_newest(folder)
        assert not damaged
        assert found.name == checkpoint.LAST
        assert saved['epoch'] in ((2, 3) if killed else (3,))
        assert digests.agrees(folder / checkpoint.PREVIOUS)
        if not killed:
            break
    assert last > 10


# --------------------------------------------------------------------------
# while training goes on


def test_a_copy_of_a_state():
    """It has the same sharing, order and metadata, and does not follow the training."""
    core = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).to(torch.float64)
    whole = {'model': core.state_dict(), 'encoder': {'weight': core[0].weight.detach()[:2].t()}, 'groups': [(0.9, {})]}
    copies = {}
    copied, before = checkpoint.on_host(whole, copies, set()), copy.deepcopy(whole)
    core[0].weight.data.zero_()
    whole['groups'][0][1]['lr'] = 1
    assert same(copied, before)
    assert copied['model']._metadata == whole['model']._metadata
    assert copied['encoder']['weight'].data_ptr() == copied['model']['0.weight'].data_ptr()
    assert copied['encoder']['weight'].stride() == (1, 4)
    again = checkpoint.on_host(whole, copies, set())  # in the same memory
    assert same(again, whole)
    assert {address: value.data_ptr() for address, value in copies.items()}[core[0].weight.data_ptr()] == (
        copied['model']['0.weight'].data_ptr()
    )


def test_one_writing_at_a_time(monkeypatch):
    """The next one waits for it, and hears what went wrong; without room for a copy there is no thread."""
    monkeypatch.setattr(checkpoint, 'SMALL', 0)
    writer, goes_on, written = checkpoint.Writer(), threading.Event(), []

    def slow(state):
        assert goes_on.wait(20)
        written.append(state['epoch'])

    def full(state):
        raise StorageError('no space')

    writer.start(slow, state(0), 1)
    writer.check()
    assert not written  # and yet we are here
    goes_on.set()
    writer.start(slow, state(1), 1)
    assert written[0] == 0
    writer.start(full, state(2), 1)
    assert written == [0, 1]
    with pytest.raises(StorageError):
        writer.start(slow, state(3), 1)
    writer.start(full, state(4), 1)
    while not writer.pending.done():
        time.sleep(0.01)
    with pytest.raises(StorageError):
        writer.check()
    for wait, room in ((True, 10**6), (False, -(10**6))):
        monkeypatch.setattr(resources, 'free_memory', lambda room=room: room)
        writer.start(lambda state: written.append(threading.current_thread()), state(5), 1, wait=wait)
        assert written[-1] is threading.main_thread()


def test_a_run_that_writes_while_it_trains(images, trained, tmp_path, monkeypatch):
    """The same files. Those of an epoch's end hold the same bytes, on sectors of their own."""
    monkeypatch.setattr(checkpoint, 'SMALL', 0)
    threads, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, 'save', lambda *args: threads.append(threading.current_thread()) or save(*args))
    flags = ['--save_freq', '1', '--keep_last', '1']
    train('pretrain', images, tmp_path, *FLAGS, *flags)
    assert [thread is threading.main_thread() for thread in threads] == [
        False,
        False,
        False,
        True,
    ]  # the end is waited for
    assert {path.name for path in checkpoint.any_in(tmp_path)} == {
        'checkpoint-1.pth',
        checkpoint.LAST,
        checkpoint.PREVIOUS,
    }
    for name in ('checkpoint-1.pth', checkpoint.LAST, checkpoint.PREVIOUS):
        assert digests.agrees(tmp_path / name)
        assert equal_states(load(tmp_path, name), load(trained / 'run', name))
    last, numbered = tmp_path / checkpoint.LAST, tmp_path / 'checkpoint-1.pth'
    assert last.read_bytes() == numbered.read_bytes()
    assert not last.samefile(numbered)


@pytest.mark.fault(13)
def test_a_disk_that_is_full_while_it_trains(images, tmp_path, monkeypatch):
    """Told at one of the next steps; what was written before is intact."""
    monkeypatch.setattr(checkpoint, 'SMALL', 0)
    saved, write = [], checkpoint.write

    def full(state, file):
        saved.append(state['step'])
        if len(saved) > 1:
            raise OSError(errno.ENOSPC, 'No space left on device')
        write(state, file)

    monkeypatch.setattr(checkpoint, 'write', full)
    with pytest.raises(
        StorageError, match=r'No space left on device; checkpoint-last\.pth of before is intact'
    ) as caught:
        train('pretrain', images, tmp_path, *FLAGS, '--batch_size', '4', '--save_freq_steps', '8', '--epochs', '9')
    assert saved == [8, 16]
    assert load(tmp_path)['step'] == 8
    status = json.loads((tmp_path / 'status.json').read_text())
    assert (status['state'], status['exit_code'], status['message']) == ('failed', 5, str(caught.value))
    assert (status['epoch'], status['step'] < 8) == (1, True)


# --------------------------------------------------------------------------
# --keep_last


def no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.promise(7)
def test_the_newest_good_ones_are_kept(tmp_path, monkeypatch, measured):
    """300 random saves, failures, losses and damages."""
    rng, keep, removed_good = random.Random(1), 3, 0
    resumed_from = tmp_path / 'checkpoint-0.pth'
    good = {0}
    checkpoint.save(resumed_from, state(0, size=10))
    checkpoint.save(tmp_path / checkpoint.BEST, state(0, size=10))
    best = (tmp_path / checkpoint.BEST).read_bytes()
    for epoch in range(1, 301):
        path = tmp_path / f'checkpoint-{epoch}.pth'
        match rng.choice(['save', 'save', 'save', 'fail', 'damage', 'delete']):
            case 'save':
                checkpoint.save(path, state(epoch, size=10))
                good.add(epoch)
            case 'fail':
                with monkeypatch.context() as patch:
                    patch.setattr(os, 'fsync', no_space)
                    with pytest.raises(StorageError):
                        checkpoint.save(path, state(epoch, size=10))
            case 'damage' if good - {0}:
                victim = rng.choice(sorted(good - {0}))
                content = bytearray((tmp_path / f'checkpoint-{victim}.pth').read_bytes())
                content[rng.randrange(len(content))] ^= 4
                (tmp_path / f'checkpoint-{victim}.pth').write_bytes(content)
                good.discard(victim)
            case 'delete' if good - {0}:
                victim = rng.choice(sorted(good - {0}))
                (tmp_path / f'checkpoint-{victim}.pth').unlink()
                good.discard(victim)
        checkpoint.prune(tmp_path, keep, in_use=[tmp_path / '..' / tmp_path.name / resumed_from.name, None])
        expected = set(sorted(good, reverse=True)[:keep]) | {0}
        left = {int(file.stem.split('-')[1]) for file in checkpoint.numbered(tmp_path)}
        removed_good += len(expected - left)
        assert left & good == expected
        good = expected
        assert (tmp_path / checkpoint.BEST).read_bytes() == best
    measured(f'the {keep} newest good, the best and the resumed-from: {removed_good} of them removed in 300 sequences')


def test_keep_last_of_a_run(images, tmp_path):
    flags = [*FLAGS, '--epochs', '4', '--save_freq', '1', '--keep_last', '2']
    train('pretrain', images, tmp_path, *flags)
    assert [path.name for path in checkpoint.numbered(tmp_path)] == ['checkpoint-3.pth', 'checkpoint-2.pth']
    assert len(list(tmp_path.glob('checkpoint-*.sha256'))) == 4


# --------------------------------------------------------------------------
# full and read-only disks


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts a file system of a given size, or read-only, and takes it down again."""
    if os.geteuid() != 0:
        pytest.skip('a small or read-only file system is mounted, for which one must be root')
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(options: str):
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'this machine mounts no tmpfs: {done.stderr.strip()}')
        return folder

    yield mount
    subprocess.run(['umount', folder], check=False, capture_output=True)


@pytest.fixture
def small_files():
    """While it is open, no file of this process can grow beyond 200 kB: EFBIG, as where a quota is full."""

    @contextlib.contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.glob('checkpoint-*')}


def folder_to_resume(trained, run):
    """A run's folder whose newest checkpoint is the previous one: epoch 1, step 2."""
    shutil.copytree(trained / 'run', run, ignore=shutil.ignore_patterns('events*', 'checkpoint-last*', 'checkpoint-1*'))
    return run


def check_nothing_lost(trained, run, before: dict, error: StorageError) -> None:
    """The files are as they were, status.json tells, and where there is room again, the run goes on to its end."""
    assert error.code == 5
    assert before.items() <= contents(run).items()
    assert not list(run.glob('.*.tmp'))
    status = json.loads((run / 'status.json').read_text())
    assert (status['state'], status['exit_code'], status['message']) == ('failed', 5, str(error))


@pytest.mark.fault(13)
def test_file_too_large(images, trained, tmp_path, small_files):
    run = folder_to_resume(trained, tmp_path / 'run')
    before = contents(run)
    with small_files(), pytest.raises(StorageError, match=r'cannot write .*: File too large') as caught:
        train('pretrain', images, run, *FLAGS, '--resume', 'auto')
    check_nothing_lost(trained, run, before, caught.value)
    resumed = train('pretrain', images, run, *FLAGS, '--resume', 'auto')
    assert same(resumed['model'], load(trained / 'run')['model'])


@pytest.mark.promise(6)
@pytest.mark.fault(13)
def test_disk_full(images, trained, tmp_path, tmpfs, measured):
    one = (trained / 'run' / checkpoint.LAST).stat().st_size
    run = folder_to_resume(trained, tmpfs(f'size={5 * one}') / 'run')
    filler = run / 'filler'
    for room, words in ((one * 3 // 4, r'0\.\d|MB of free space'), (one * 5 // 4, 'No space left on device')):
        before = contents(run)
        filler.write_bytes(bytes(shutil.disk_usage(run).free - room))
        with pytest.raises(StorageError, match=words) as caught:
            train('pretrain', images, run, *FLAGS, '--resume', 'auto')
        check_nothing_lost(trained, run, before, caught.value)
        filler.unlink()
    resumed = train('pretrain', images, run, *FLAGS, '--resume', 'auto')
    assert same(resumed['model'], load(trained / 'run')['model'])
    measured(
        f'{len(before) // 2} checkpoints bit for bit as before after a full disk and after too large a file; exit 5'
    )


@pytest.mark.fault(14)
def test_read_only_folder(images, trained, tmpfs):
    disk = tmpfs('ro')
    with pytest.raises(StorageError, match=r'cannot write to the output folder .*: Read-only file system'):
        train('pretrain', images, disk, *FLAGS)


@pytest.mark.fault(35)
def test_a_folder_that_vanishes(images, trained, tmp_path, monkeypatch):
    def vanish(state, file, write=checkpoint.write):
        shutil.rmtree(tmp_path / 'run')
        write(state, file)

    monkeypatch.setattr(checkpoint, 'write', vanish)
    with pytest.raises(StorageError, match=r'cannot write .*checkpoint-last\.pth: there is no folder '):
        train('pretrain', images, tmp_path / 'run', *FLAGS)
