"""What docs/reliability.md promises of resumed runs, measured: the same bytes, samples, learning rates and logs."""

import collections
import itertools
import json
import random

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import MIXED, SHORT, load, run, same, train

from util.data.datasets import EpochBatches
from util.log import RunLog
from util.optim import GuardedStep

FLAGS = [*SHORT, '--accum_iter', '2']  # 4 steps
METHODS = {  # a model of every method, and what else a state can have: BatchNorm, LAMB, averages, loader processes
    'MIRL': ('pretrain', ['--num_workers', '2']),
    'LocalMIM': ('pretrain', ['--model', 'localmim_vit_tiny']),
    'MixMAE': ('pretrain', ['--model', 'mixmae_tiny']),
    'A2MIM': ('pretrain', ['--model', 'a2mim_resnet_tiny', '--opt', 'lamb']),
    'fine-tuning': ('finetune', MIXED),
}


def largest_difference(a, b) -> float:
    """Over all tensors of two nested states; infinite if anything else differs."""
    if isinstance(a, torch.Tensor):
        return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    if isinstance(a, dict) and a.keys() == b.keys():
        return max((largest_difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list | tuple) and len(a) == len(b):
        return max(map(largest_difference, a, b), default=0.0)
    return 0.0 if a == b else float('inf')


class Killed(BaseException):
    pass


@pytest.mark.promise(1)
@pytest.mark.parametrize('method', METHODS)
def test_killed_between_two_micro_steps(method, images, tmp_path, monkeypatch, measured):
    """Twice in a row, the second time right after the resume."""
    stage, flags = METHODS[method]
    flags = [*FLAGS, *flags, '--save_freq_steps', '1', '--resume', 'auto']
    whole = train(stage, images, tmp_path / 'whole', *flags)
    for micro_steps in (11, 3):  # in the second micro-step of step 6, and then of the second step after it
        calls = 0

        def backward(self, loss, original=GuardedStep.backward, last=micro_steps):
            nonlocal calls
            calls += 1
            if calls == last:
                raise Killed
            original(self, loss)

        with monkeypatch.context() as patch:
            patch.setattr(GuardedStep, 'backward', backward)
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


def scalars(folder, name: str) -> dict[int, float]:
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
def test_killed_between_the_log_and_the_checkpoint(stage, images, tmp_path, monkeypatch):
    """In the first epoch: its line is written once."""

    def killed(self, original=RunLog.epoch, **values):
        original(self, **values)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, 'epoch', killed)
        with pytest.raises(Killed):
            train(stage, images, tmp_path, *FLAGS)
    train(stage, images, tmp_path, *FLAGS, '--resume', 'auto')
    assert [epoch['epoch'] for epoch in read_log(tmp_path)] == [0, 1]


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


@pytest.mark.promise(3, 14)
@pytest.mark.timeout(110)
def test_the_number_of_ranks_may_change(images, tmp_path, measured):
    """2 -> 1 -> 2 -> 1 ranks, each stopped in mid-epoch, against two ranks throughout; and what the logs show of it."""
    flags = ['--batch_size', '8', '--epochs', '3', '--warmup_epochs', '1', '--blr', '4e-3', '--save_freq_steps', '1']
    flags += ['--effective_batch_size', '16', '--resume', 'auto']
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    assert run('pretrain', images, whole, *flags, ranks=2).returncode == 0
    assert run('pretrain', images, part, *flags, ranks=2, fault='exit:0:2').returncode == 1
    assert run('pretrain', images, part, *flags, fault='exit:1:3').returncode == 9
    assert run('pretrain', images, part, *flags, ranks=2, fault='exit:2:1').returncode == 1
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
