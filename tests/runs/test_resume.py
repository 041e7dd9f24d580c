"""Resumed runs: the same bytes wherever they were stopped, on more or fewer ranks too, and logs without gaps."""

import collections
import contextlib
import itertools
import json
import random
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import MIXED, SHORT, equal_states, load, run, same, train

from util import checkpoint, dist
from util.data.datasets import EpochBatches
from util.log import RunLog
from util.optim import GuardedOptimizer
from util.run import Run

PRETRAIN = [*SHORT, '--accum_iter', '2']  # 4 steps an epoch
FINETUNE = [*PRETRAIN, *MIXED]
METHODS = {  # a model of every method, and what else a state can have: BatchNorm, LAMB, averages, loader processes
    'MIRL': ('pretrain', ['--num_workers', '2']),
    'LocalMIM': ('pretrain', ['--model', 'localmim_vit_tiny']),
    'MixMAE': ('pretrain', ['--model', 'mixmae_tiny']),
    'A2MIM': ('pretrain', ['--model', 'a2mim_resnet_tiny', '--opt', 'lamb']),
    'fine-tuning': ('finetune', MIXED),
    'linear probe': ('finetune', ['--probe', 'linear', '--model', 'a2mim_resnet_tiny', '--lr', '1']),
}


# --------------------------------------------------------------------------
# the same bytes


@pytest.mark.parametrize(('stage', 'flags'), [('pretrain', PRETRAIN), ('finetune', FINETUNE)])
def test_resumed_equals_uninterrupted(stage, flags, images, tmp_path, monkeypatch):
    """From checkpoints inside an epoch, at its end and before an evaluation, and again in the run's own folder."""
    flags = [*flags, '--epochs', '3', '--save_freq_steps', '1', '--save_freq', '1']
    moments = {}

    def save_and_copy(self, name, epoch, step, closed=True, save=Run.save, **more):
        save(self, name, epoch, step, closed, **more)
        if name == checkpoint.LAST and tmp_path / 'whole' == self.args.output_dir:
            moments[epoch.number, step, closed] = tmp_path / f'{epoch.number}-{step}-{closed}.pth'
            shutil.copy(self.args.output_dir / name, moments[epoch.number, step, closed])

    monkeypatch.setattr(Run, 'save', save_and_copy)
    whole = train(stage, images, tmp_path / 'whole', *flags)
    kept, log = dict(moments), untimed(tmp_path / 'whole')
    before_evaluations = 3 if stage == 'finetune' else 0
    assert len(moments) == 12 + before_evaluations  # 66 images, 16 a step: 4 steps an epoch, 3 epochs
    evaluating = [(1, 4, False), (2, 4, False)] if before_evaluations else []  # the second: of the last epoch
    for moment in ((0, 1, True), (1, 4, True), *evaluating):
        resumed = train(stage, images, tmp_path / moments[moment].stem, *flags, '--resume', moments[moment])
        assert equal_states(resumed, whole)

    # over the finished run's own folder: epochs that are run again are logged once
    for file in (tmp_path / 'whole').glob('checkpoint-*'):
        file.unlink()
    shutil.copy(kept[1, 3, True], tmp_path / 'whole' / checkpoint.LAST)
    resumed = train(stage, images, tmp_path / 'whole', *flags, '--resume', 'auto')
    assert equal_states(resumed, whole)
    assert untimed(tmp_path / 'whole') == log


def test_workers_change_nothing(images, tmp_path):
    alone = train('pretrain', images, tmp_path / 'a', *PRETRAIN)
    helped = train('pretrain', images, tmp_path / 'b', *PRETRAIN, '--num_workers', '2')
    assert equal_states(alone, helped)


class Killed(BaseException):
    pass


def largest_difference(a, b) -> float:
    """Over all tensors of two nested states; infinite if anything else differs."""
    if isinstance(a, torch.Tensor):
        return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    if isinstance(a, dict) and a.keys() == b.keys():
        return max((largest_difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list | tuple) and len(a) == len(b):
        return max(map(largest_difference, a, b), default=0.0)
    return 0.0 if a == b else float('inf')


@pytest.mark.promise(1)
@pytest.mark.parametrize('method', METHODS)
def test_killed_between_two_micro_steps(method, images, tmp_path, monkeypatch, measured):
    """Twice in a row, the second time right after the resume."""
    stage, flags = METHODS[method]
    flags = [*PRETRAIN, *flags, '--save_freq_steps', '1', '--resume', 'auto']
    whole = train(stage, images, tmp_path / 'whole', *flags)
    for micro_steps in (11, 3):  # in the second micro-step of step 6, and then of the second step after it
        calls = 0

        def backward(self, loss, original=GuardedOptimizer.backward, last=micro_steps):
            nonlocal calls
            calls += 1
            if calls == last:
                raise Killed
            original(self, loss)

        with monkeypatch.context() as patch:
            patch.setattr(GuardedOptimizer, 'backward', backward)
            with pytest.raises(Killed):
                train(stage, images, tmp_path / 'killed', *flags)
    killed = load(tmp_path / 'killed')
    assert (killed['epoch'], killed['step']) == (1, 2)
    resumed = train(stage, images, tmp_path / 'killed', *flags)
    parts = ('model', 'optimizer', 'ema', 'record', 'logger')
    difference = max(largest_difference(resumed.get(key), whole.get(key)) for key in parts)
    measured(f'{method}: killed twice in mid-accumulation, largest difference of weights and optimiser {difference}')
    assert difference == 0.0
    assert all(same(resumed.get(key), whole.get(key)) for key in parts)


def test_settings_may_change_on_resume(images, tmp_path):
    """Decay and precision are the resuming run's own; moments follow their parameters from group to group."""
    first = train('finetune', images, tmp_path, *FINETUNE[:-3], '--save_freq', '1')
    more = ['--epochs', '3', '--weight_decay', '0', '--layer_decay', '1', '--amp_dtype', 'fp16', '--resume', 'auto']
    second = train('finetune', images, tmp_path, *FINETUNE[:-3], *more)
    assert len(first['optimizer']['param_groups']) > len(second['optimizer']['param_groups']) == 1
    assert all(state['step'] == 12 for state in second['optimizer']['state'].values())


# --------------------------------------------------------------------------
# other splits of the same batch, over ranks and micro-steps


@pytest.mark.promise(2)
def test_no_sample_lost_or_doubled(measured):
    """Interrupted at 20 random steps, each time by another number of ranks and micro-steps, at one global batch."""
    rng, images, epochs = random.Random(0), 1003, 6
    splits = [(16, 4, 1), (16, 1, 4), (8, 4, 2), (32, 2, 1), (4, 2, 8)]  # batch size, accumulation, ranks
    steps = images // 64
    stops = [0, *sorted(rng.sample(range(1, epochs * steps), 20)), epochs * steps]
    seen = collections.Counter()
    for i, (begin, end) in enumerate(itertools.pairwise(stops)):
        batch, accum_iter, ranks = splits[i % len(splits)]
        for rank in range(ranks):
            sampler = EpochBatches(images, batch, accum_iter, rank, ranks, seed=3)
            for step in range(begin, end):
                sampler.start(step // steps, step % steps)
                for _, micro in zip(range(accum_iter), sampler, strict=False):
                    seen.update(micro)
    doubled = sum(count > 1 for count in seen.values())
    lost = epochs * steps * 64 - len(seen)
    assert all(len({i for epoch, i in seen if epoch == e}) == steps * 64 for e in range(epochs))
    measured(f'{len(seen)} samples of {epochs} epochs, interrupted at 20 random steps: {lost} lost, {doubled} doubled')
    assert (lost, doubled) == (0, 0)


def losses(folder, name: str = 'train_loss') -> torch.Tensor:
    lines = (folder / 'log.txt').read_text().splitlines()
    return torch.tensor([json.loads(line)[name] for line in lines], dtype=torch.float64)


def test_any_split_of_the_batch_agrees(images, tmp_path, measured):
    """12 steps of 16 images: one forward, two, and two ranks of one forward each."""
    flags = ['--epochs', '3', '--warmup_epochs', '1', '--lr', '1e-3', '--knn_freq', '3']  # 4 steps an epoch
    train('pretrain', images, tmp_path / 'one', *flags, '--batch_size', '16')
    train('pretrain', images, tmp_path / 'accum', *flags, '--batch_size', '8', '--accum_iter', '2')
    done = run('pretrain', images, tmp_path / 'ranks', *flags, '--batch_size', '8', ranks=2)
    assert done.returncode == 0, done.stderr
    reference = losses(tmp_path / 'one')
    for name in ('accum', 'ranks'):
        difference = ((losses(tmp_path / name) - reference).abs() / reference).max()
        measured(f'split of the global batch, {name} against one: loss differs by {difference:.1e} over 12 steps')
        assert difference < 1e-5
        # AdamW hides a factor that all gradients share; their norm does not
        norms = [losses(tmp_path / run, 'train_grad_norm') for run in (name, 'one')]
        assert torch.allclose(*norms, rtol=1e-4)
        last, first = (read_log(tmp_path / run)[-1] for run in (name, 'one'))
        assert last['knn_top1'] == first['knn_top1']
        assert last['rank'] == pytest.approx(first['rank'], rel=1e-4)


def test_gradients_are_reduced_once_a_step(images, tmp_path, monkeypatch):
    """All micro-steps but the last leave out DDP's reduction."""
    lasts = []

    def no_sync(model, last, no_sync=dist.no_sync):
        lasts.append(last)
        return no_sync(model, last)

    monkeypatch.setattr(dist, 'no_sync', no_sync)
    train('pretrain', images, tmp_path, *PRETRAIN, '--accum_iter', '4')
    assert lasts == [False, False, False, True] * 4
    model = SimpleNamespace(no_sync=lambda: contextlib.nullcontext('left out'))
    with dist.no_sync(model, last=False) as inner, dist.no_sync(model, last=True) as outer:
        assert (inner, outer) == ('left out', None)


def scalars(folder, name: str) -> dict[int, float]:
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


def untimed(folder) -> list[dict]:
    """What a repeat leaves equal."""
    TIMED = ('time', 'images_per_s', 'waiting_for_data')
    return [{key: value for key, value in line.items() if key not in TIMED} for line in read_log(folder)]


@pytest.mark.promise(3, 14)
def test_the_number_of_ranks_may_change(images, tmp_path, measured):
    """2 -> 1 -> 2 -> 1 ranks, each stopped in mid-epoch, against two ranks throughout; and what the logs show of it.

    Two ranks begin with a damaged file: both go on from the one before, which the first alone reads.
    """
    flags = ['--batch_size', '8', '--epochs', '3', '--warmup_epochs', '1', '--blr', '4e-3', '--save_freq_steps', '1']
    flags += ['--effective_batch_size', '16', '--resume', 'auto']
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    assert run('pretrain', images, whole, *flags, ranks=2).returncode == 0
    for fault, ranks in (('exit:0:2', 2), ('exit:1:3', 1), ('exit:2:1', 2)):
        if fault == 'exit:2:1':
            with open(part / checkpoint.LAST, 'r+b') as file:
                file.seek(50000)
                file.write(b'damage')
        assert run('pretrain', images, part, *flags, ranks=ranks, fault=fault).returncode == 9
        time.sleep(1)  # TensorBoard reads event files by the second in their names, then by process id, as text
    train('pretrain', images, part, *flags)

    rates, reference = scalars(part, 'lr'), scalars(whole, 'lr')
    rate = max(abs(rates[step] - reference[step]) for step in reference)
    losses, reference = ([epoch['train_loss'] for epoch in read_log(folder)] for folder in (part, whole))
    loss = max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))
    measured(f'2 -> 1 -> 2 -> 1 ranks: learning rates differ by {rate}, losses by {loss:.1e} at most')
    assert rate == 0
    assert loss < 1e-5

    events = EventAccumulator(str(part), size_guidance={'scalars': 0})
    events.Reload()
    for name in events.Tags()['scalars']:
        steps = [event.step for event in events.Scalars(name)]
        assert len(steps) == 12
        assert all(a < b for a, b in itertools.pairwise(steps)), (name, steps)
    measured(f'after 3 resumes: steps of all {len(events.Tags()["scalars"])} curves increase strictly, none is missing')
    assert [epoch['epoch'] for epoch in read_log(part)] == [0, 1, 2]


# --------------------------------------------------------------------------
# logs


@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
def test_killed_between_the_log_and_the_checkpoint(stage, images, tmp_path, monkeypatch):
    """In the first epoch: its line is written once."""

    def killed(self, original=RunLog.epoch, **values):
        original(self, **values)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, 'epoch', killed)
        with pytest.raises(Killed):
            train(stage, images, tmp_path, *PRETRAIN)
    train(stage, images, tmp_path, *PRETRAIN, '--resume', 'auto')
    assert [epoch['epoch'] for epoch in read_log(tmp_path)] == [0, 1]
