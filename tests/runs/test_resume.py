"""A run that is stopped anywhere and resumed ends with the same bytes as one that was not; splits of a batch agree."""

import contextlib
import json
import shutil
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from training import MIXED, SHORT, command, environment, equal_states, load, run, train

from util import checkpoint, dist
from util.errors import StorageError
from util.run import Run

PRETRAIN = [*SHORT, '--accum_iter', '2', '--epochs', '3']
FINETUNE = [*PRETRAIN, *MIXED]


@pytest.mark.parametrize(('stage', 'flags'), [('pretrain', PRETRAIN), ('finetune', FINETUNE)])
def test_resumed_equals_uninterrupted(stage, flags, images, tmp_path, monkeypatch):
    """Resume from every checkpoint of a run: inside an epoch, at its end, and twice in a row."""
    flags = [*flags, '--save_freq_steps', '1', '--save_freq', '1']
    moments = {}

    def save_and_copy(self, name, epoch, step, logger, closed=True, save=Run.save):
        save(self, name, epoch, step, logger, closed)
        if name == checkpoint.LAST and tmp_path / 'whole' == self.args.output_dir:
            moments[epoch, step, closed] = tmp_path / f'{epoch}-{step}-{closed}.pth'
            shutil.copy(self.args.output_dir / name, moments[epoch, step, closed])

    monkeypatch.setattr(Run, 'save', save_and_copy)
    whole = train(stage, images, tmp_path / 'whole', *flags)
    log = (tmp_path / 'whole' / 'log.txt').read_text()
    before_evaluations = 3 if stage == 'finetune' else 0
    assert len(moments) == 12 + before_evaluations  # 66 images, 16 a step: 4 steps an epoch, 3 epochs
    evaluating = [(1, 4, False)] if before_evaluations else []
    for moment in ((0, 1, True), (1, 2, True), (1, 4, True), *evaluating):
        resumed = train(stage, images, tmp_path / moments[moment].stem, *flags, '--resume', moments[moment])
        assert equal_states(resumed, whole)

    folder = tmp_path / 'twice'
    folder.mkdir()
    for moment in ((0, 2, True), (1, 3, True)):  # the second was written by the whole run: replace what the first left
        for file in folder.glob('checkpoint-*'):
            file.unlink()
        shutil.copy(moments[moment], folder / checkpoint.LAST)
        resumed = train(stage, images, folder, *flags, '--resume', 'auto')
    assert equal_states(resumed, whole)

    # over the finished run's own folder: epochs that are run again are logged once
    for file in (tmp_path / 'whole').glob('checkpoint-*'):
        file.unlink()
    shutil.copy(moments[1, 3, True], tmp_path / 'whole' / checkpoint.LAST)
    train(stage, images, tmp_path / 'whole', *flags, '--resume', 'auto')
    assert (tmp_path / 'whole' / 'log.txt').read_text() == log


def test_workers_change_nothing(images, tmp_path):
    alone = train('pretrain', images, tmp_path / 'a', *PRETRAIN, '--epochs', '2')
    helped = train('pretrain', images, tmp_path / 'b', *PRETRAIN, '--epochs', '2', '--num_workers', '2')
    assert equal_states(alone, helped)


def test_killed_in_mid_epoch(images, tmp_path):
    """SIGKILL, `--resume auto`, and the same bytes."""
    flags = [*PRETRAIN, '--batch_size', '4', '--save_freq_steps', '1', '--epochs', '2']  # 8 steps an epoch
    whole = train('pretrain', images, tmp_path / 'whole', *flags)
    line = command('pretrain', images, tmp_path / 'killed', *flags)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment())
    for text in process.stdout:
        if '[5/8]' in text:  # step 4 is on the disk, step 5 may be
            process.send_signal(signal.SIGKILL)
            break
    process.wait(30)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    killed = load(tmp_path / 'killed')
    assert killed['epoch'] == 0
    assert 4 <= killed['step'] <= 6
    assert equal_states(train('pretrain', images, tmp_path / 'killed', *flags, '--resume', 'auto'), whole)


def losses(folder, name: str = 'train_loss') -> torch.Tensor:
    lines = (folder / 'log.txt').read_text().splitlines()
    return torch.tensor([json.loads(line)[name] for line in lines], dtype=torch.float64)


def test_any_split_of_the_batch_agrees(images, tmp_path, measured):
    """50 steps of 16 images: one forward, two, and two ranks of one forward each."""
    flags = ['--epochs', '13', '--warmup_epochs', '2', '--lr', '1e-3']  # 4 steps an epoch
    train('pretrain', images, tmp_path / 'one', *flags, '--batch_size', '16')
    train('pretrain', images, tmp_path / 'accum', *flags, '--batch_size', '8', '--accum_iter', '2')
    done = run('pretrain', images, tmp_path / 'ranks', *flags, '--batch_size', '8', ranks=2)
    assert done.returncode == 0, done.stderr
    reference = losses(tmp_path / 'one')
    assert len(reference) * 4 >= 50
    for name in ('accum', 'ranks'):
        difference = ((losses(tmp_path / name) - reference).abs() / reference).max()
        measured(f'split of the global batch, {name} against one: loss differs by {difference:.1e} over 52 steps')
        assert difference < 1e-5
        # AdamW hides a factor that all gradients share; their norm does not
        norms = [losses(tmp_path / run, 'train_grad_norm') for run in (name, 'one')]
        assert torch.allclose(*norms, rtol=1e-4)


def test_gradients_are_reduced_once_a_step(images, tmp_path, monkeypatch):
    """All micro-steps but the last leave out DDP's reduction."""
    lasts = []

    def no_sync(model, last, no_sync=dist.no_sync):
        lasts.append(last)
        return no_sync(model, last)

    monkeypatch.setattr(dist, 'no_sync', no_sync)
    train('pretrain', images, tmp_path, *PRETRAIN, '--accum_iter', '4', '--epochs', '2')
    assert lasts == [False, False, False, True] * 4
    model = SimpleNamespace(no_sync=lambda: contextlib.nullcontext('left out'))
    with dist.no_sync(model, last=False) as inner, dist.no_sync(model, last=True) as outer:
        assert (inner, outer) == ('left out', None)


def test_settings_may_change_on_resume(images, tmp_path):
    """Decay and precision are the resuming run's own; moments follow their parameters from group to group."""
    first = train('finetune', images, tmp_path, *FINETUNE[:-3], '--epochs', '2', '--save_freq', '1')
    more = ['--epochs', '3', '--weight_decay', '0', '--layer_decay', '1', '--amp_dtype', 'fp16', '--resume', 'auto']
    second = train('finetune', images, tmp_path, *FINETUNE[:-3], *more)
    assert len(first['optimizer']['param_groups']) > len(second['optimizer']['param_groups']) == 1
    assert all(state['step'] == 12 for state in second['optimizer']['state'].values())


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
