"""Steps that are not finite: left out alike everywhere, up to a number in a row; then a diagnosis, and its replay."""

import copy
import functools
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from training import MAINS, MIXED, SHORT, load, run, same, train

import engine_finetune
import engine_pretrain
from scripts import replay_step
from util import checkpoint, diagnosis, optim
from util.data.datasets import EpochBatches
from util.errors import DivergedError, UserError
from util.log import MetricLogger

FLAGS = [*SHORT, '--accum_iter', '2', '--epochs', '3', '--warmup_epochs', '0']
RESNET = ['--model', 'a2mim_resnet_tiny', '--opt', 'lamb']
ENGINES = {'pretrain': engine_pretrain, 'finetune': engine_finetune}


def spoil(monkeypatch, stage: str, steps, how=lambda training, loss: loss * math.nan) -> None:
    """Make the loss of these optimiser steps of the run another one."""

    def forward(training, batch, global_step, *more, forward=ENGINES[stage].forward):
        loss, terms = forward(training, batch, global_step, *more)
        return how(training, loss) if global_step in steps else loss, terms

    monkeypatch.setattr(ENGINES[stage], 'forward', forward)


def bad_gradient(training, loss):
    """A finite loss whose gradient is not: the slope of a root at zero."""
    return loss + (next(training.core.parameters()) * 0).sum().sqrt()


def diverge(stage, images, output, *flags) -> str:
    """Train until the run ends by itself; returns its line, with the folder's name left out."""
    with pytest.raises(DivergedError) as caught:
        train(stage, images, output, *flags)
    assert caught.value.code == 3
    return str(caught.value).replace(f'{output}/', '')


def replay(output, capsys, *flags) -> str:
    capsys.readouterr()
    replay_step.main(replay_step.get_args_parser().parse([str(output / 'diagnosis.json'), *flags]))
    return capsys.readouterr().out


def record_of(output) -> dict:
    def refuse(word):
        raise ValueError(f'{word} is not JSON')

    return json.loads((output / 'diagnosis.json').read_text(), parse_constant=refuse)


def without_counters(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.endswith('num_batches_tracked')}


# --------------------------------------------------------------------------
# the streak, the stop, and what they leave


@pytest.mark.parametrize(('stage', 'more'), [('pretrain', []), ('pretrain', RESNET), ('finetune', MIXED)])
def test_a_streak_changes_nothing(stage, more, images, tmp_path, monkeypatch):
    """Weights, moments, statistics and averages stay, however late it shows; no checkpoint is written any more."""
    states, save = [], checkpoint.save

    def save_and_keep(path, state):
        states.extend([copy.deepcopy(state)] if 'optimizer' in state else [])
        save(path, state)

    monkeypatch.setattr(checkpoint, 'save', save_and_keep)
    spoil(monkeypatch, stage, range(2, 100))
    flags = [*FLAGS, '--save_freq_steps', '2', '--print_freq', '100', '--max_bad_steps', '2', *more]
    line = diverge(stage, images, tmp_path, *flags)
    assert line == (
        'epoch 1, step 1 of 4: loss or gradient was not finite in 3 steps in a row (--max_bad_steps 2); no such step '
        "changed a weight; rank 0's loss was not finite; "
        'see diagnosis.json, and scripts/replay_step.py diagnosis.json finds the first module'
    )
    good, within = {state['step']: state for state in states}.values()  # of epoch 0; the later of two at its end
    assert [state['guard'] for state in (good, within)] == [
        {'streak': 0, 'bad_steps': 0},
        {'streak': 2, 'bad_steps': 2},
    ]
    for state in (good, within):
        for group in state['optimizer']['param_groups']:
            del group['lr']
    for key in ('model', 'optimizer', 'ema'):
        assert same(without_counters(within.get(key, {})), without_counters(good.get(key, {})))
    assert ('ema' in good) == ('--use_ema' in more)
    assert same(load(tmp_path)['model'], within['model'])
    diagnosed = load(tmp_path, 'diagnosis.pth')['model']  # of two steps later, the second after the guard had tripped
    assert same(without_counters(diagnosed), without_counters(good['model']))
    assert sorted(file.name for file in tmp_path.glob('*.pth')) == [
        *(['checkpoint-best.pth'] if stage == 'finetune' else []),
        'checkpoint-last.pth',
        'checkpoint-previous.pth',
        'diagnosis.pth',
    ]

    # what happened, to read
    record = record_of(tmp_path)
    assert {key: record[key] for key in ('epoch', 'step', 'steps', 'global_step', 'bad_steps', 'max_bad_steps')} == {
        'epoch': 1,
        'step': 1,
        'steps': 4,
        'global_step': 4,
        'bad_steps': 3,
        'max_bad_steps': 2,
    }
    assert (record['precision'], record['loss_scale'], record['bad_ranks']) == ('float32', None, [0])
    [seen] = record['ranks']
    assert seen['grad_norm'] == 'nan'
    assert [step['loss'] for step in seen['micro_steps']] == ['nan', 'nan']
    if stage == 'pretrain':
        assert all(isinstance(value, float) for step in seen['micro_steps'] for value in step['terms'].values())
    sampler = EpochBatches(66, 8, 2, 0, 1, 0)
    sampler.start(1)
    for items, step in zip(sampler, seen['micro_steps'], strict=False):
        assert [tuple(sample['item']) for sample in step['samples']] == items
        assert all(sample['path'].startswith(str(images / 'train')) for sample in step['samples'])


def test_a_streak_across_a_resume(images, tmp_path, monkeypatch):
    """The resumed run ends where the uninterrupted one does; of older checkpoints the count starts anew."""
    flags = [*FLAGS, '--save_freq_steps', '1']
    spoil(monkeypatch, 'pretrain', range(2, 100))
    line = diverge('pretrain', images, tmp_path / 'whole', *flags)
    assert line.startswith('epoch 1, step 2 of 4: ')
    state = load(tmp_path / 'whole')
    assert (state['epoch'], state['step'], state['guard']) == (1, 1, {'streak': 3, 'bad_steps': 3})
    assert diverge('pretrain', images, tmp_path / 'whole', *flags, '--resume', 'auto') == line
    assert record_of(tmp_path / 'whole')['bad_steps'] == 4

    del state['guard']
    (tmp_path / 'older').mkdir()
    checkpoint.save(tmp_path / 'older' / 'checkpoint-last.pth', state)
    line = diverge('pretrain', images, tmp_path / 'older', *flags, '--resume', 'auto')
    assert line.startswith('epoch 2, step 1 of 4: ')  # four steps on


@pytest.mark.promise(10)
def test_some_bad_steps_are_survived(images, tmp_path, monkeypatch, capsys, measured):
    """As many as are allowed in a row, twice: counted in lines, log.txt and TensorBoard, and in no average."""
    bad = {1, 2, 3, 6, 7, 8}
    spoil(monkeypatch, 'pretrain', bad)
    state = train('pretrain', images, tmp_path, *FLAGS)
    assert state['guard'] == {'streak': 0, 'bad_steps': 6}
    assert {int(moments['step']) for moments in state['optimizer']['state'].values()} == {12 - 6}
    lines = re.findall(r'Epoch: .*', capsys.readouterr().out)
    shown = [int(found[1]) if (found := re.search(r'bad_steps: (\d+)', line)) else 0 for line in lines]
    assert shown == [0, 1, 2, 3, 3, 3, 4, 5, 6, 6, 6, 6]
    assert [i for i, line in enumerate(lines) if 'loss: nan' in line] == sorted(bad)
    epochs = [json.loads(line) for line in (tmp_path / 'log.txt').read_text().splitlines()]
    assert [epoch['bad_steps'] for epoch in epochs] == [3, 5, 6]
    assert all(math.isfinite(epoch['train_loss']) for epoch in epochs)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars('train/bad_steps')] == shown
    measured(f'{len(bad)} bad steps of 12, at most 3 in a row: skipped, the run goes on')


@pytest.mark.promise(10)
def test_after_a_stop(images, tmp_path, monkeypatch, measured):
    """The last checkpoint is finite, and goes on to the end where the cause is gone."""
    with monkeypatch.context() as patch:
        spoil(patch, 'pretrain', range(5, 100))
        diverge('pretrain', images, tmp_path, *FLAGS, '--save_freq_steps', '1')
    stopped = load(tmp_path)
    assert (stopped['epoch'], stopped['step']) == (1, 4)
    finite = [value.isfinite().all() for value in stopped['model'].values()]
    assert all(finite)
    ended = train('pretrain', images, tmp_path, *FLAGS, '--resume', 'auto')
    assert (ended['epoch'], ended['step'], ended['guard']) == (2, 4, {'streak': 0, 'bad_steps': 3})
    measured(f'after a stop: {sum(finite)} of {len(finite)} saved tensors finite, and the run resumes to its end')


def underflow(monkeypatch):
    """fp16's loss scale has been halved until nothing was left."""
    monkeypatch.setattr(optim.torch.amp, 'GradScaler', functools.partial(torch.amp.GradScaler, init_scale=0.0))


CASES = {
    'NaN loss': (lambda patch: spoil(patch, 'pretrain', range(5, 100)), [], "rank 0's loss was not finite"),
    'NaN in the gradients, the loss finite': (
        lambda patch: spoil(patch, 'pretrain', range(5, 100), bad_gradient),
        [],
        'every loss was finite, a gradient was not',
    ),
    'Inf in the input': (lambda patch: None, ['--std', *['1e-40'] * 3], "rank 0's loss was not finite"),
    'fp16 with a loss scale that has underflowed to 0': (
        underflow,
        ['--amp_dtype', 'fp16', '--max_bad_steps', '6'],
        'every loss was finite, a gradient was not, at a loss scale of 0',
    ),
    'learning rate 1e9': (lambda patch: None, ['--lr', '1e9'], "rank 0's loss was not finite"),
}


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize('case', CASES)
def test_causes(case, images, tmp_path, monkeypatch):
    """Each ends with code 3 within the steps allowed, and what was saved before it can be loaded."""
    cause, flags, why = CASES[case]
    cause(monkeypatch)
    line = diverge('pretrain', images, tmp_path, *FLAGS, *flags, '--save_freq_steps', '1')
    assert why in line
    state = load(tmp_path)
    record = record_of(tmp_path)
    assert state['guard']['streak'] == record['max_bad_steps']
    assert all(value.isfinite().all() for value in state['model'].values())


def test_the_diagnosis_cannot_be_written(images, tmp_path, monkeypatch):
    """A full disk is told beside what matters more."""
    save = checkpoint.save

    def full(path, state):
        if path.name == diagnosis.WEIGHTS:
            raise OSError(28, 'No space left on device')
        save(path, state)

    monkeypatch.setattr(checkpoint, 'save', full)
    spoil(monkeypatch, 'pretrain', range(100))
    line = diverge('pretrain', images, tmp_path, *FLAGS)
    assert line.endswith('diagnosis.json could not be written: [Errno 28] No space left on device')


def test_averages_are_over_what_is_finite():
    logger = MetricLogger('', 0, 4, 1, 4, torch.device('cpu'))
    for loss in (1.0, math.nan, 3.0):
        for half in (0.5, 1.5):
            logger.update(loss=torch.tensor(loss * half), never=torch.tensor(math.inf))
        logger.update(grad_norm=torch.tensor(loss))
    assert logger.observed(3, steps_ago=2) == {'loss': [0.5, 1.5], 'never': [math.inf] * 2, 'grad_norm': [1.0]}
    averages = logger.line(2, 0.1)
    assert (averages['loss'], averages['grad_norm']) == (2.0, 2.0)
    assert math.isnan(averages['never'])
    logger.update(loss=torch.tensor(7.0), grad_norm=torch.tensor(9.0))
    assert logger.observed(4, steps_ago=0) == {'loss': [7.0], 'grad_norm': [9.0]}
    assert logger.sums() == {'loss': [15.0, 5], 'never': [0.0, 0], 'grad_norm': [13.0, 3]}
    assert math.isnan(logger.averages()['never'])


# --------------------------------------------------------------------------
# two ranks


@pytest.mark.promise(10)
def test_two_ranks_go_on_alike(images, tmp_path, measured):
    """Whichever rank's loss was bad: both have the same weights, and the same as if it had been the other's."""
    flags = ['--batch_size', '8', '--epochs', '1', '--warmup_epochs', '0', '--lr', '1e-3']
    ends = []
    for rank in (0, 1):
        done = run('pretrain', images, tmp_path / str(rank), *flags, ranks=2, fault=f'nan:{rank}:1-2')
        assert done.returncode == 0, done.stderr
        digests = re.findall(r'rank \d: weights (\w+)', done.stdout)
        assert len(digests) == 2
        assert len(set(digests)) == 1
        ends.append(load(tmp_path / str(rank)))
        assert ends[-1]['guard'] == {'streak': 0, 'bad_steps': 2}
        assert {int(moments['step']) for moments in ends[-1]['optimizer']['state'].values()} == {4 - 2}
    assert all(same(ends[0][key], ends[1][key]) for key in ('model', 'optimizer', 'guard'))
    measured('NaN on one of two ranks in 2 steps: weights of both equal to the bit, whichever rank it was')


@pytest.mark.promise(10)
@pytest.mark.fault(26)
def test_the_image_of_one_rank(tmp_path, capsys, measured):
    """Two ranks, one image that no float32 can hold: rank, image and module are named, on both ranks alike."""
    sampler = EpochBatches(33, 4, 1, 1, 2, seed=0)
    sampler.start(0, 2)
    (_, index), *_ = next(iter(sampler))  # in step 3, on rank 1
    (tmp_path / 'data').mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for i in range(33):
        pixels = noise if i == index else np.full((40, 40, 3), 128, np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'data' / f'{i:02d}.png')
    guilty = tmp_path / 'data' / f'{index:02d}.png'
    # gray is the mean, and all else is infinitely many deviations away from it
    flags = ['--mean', *[str(128 / 255)] * 3, '--std', *['1e-40'] * 3, '--batch_size', '4', '--epochs', '1']
    flags += ['--warmup_epochs', '0', '--lr', '1e-3', '--max_bad_steps', '0', '--save_freq_steps', '2']
    folder = tmp_path / 'run'
    done = run('pretrain', tmp_path / 'data', folder, *flags, '--print_freq', '100', ranks=2)
    assert done.codes == [3, 3]
    [line] = re.findall(r'main_pretrain.py: error: (.*)', done.stderr)
    assert line.startswith(
        'epoch 0, step 3 of 4: loss or gradient was not finite in 1 step in a row (--max_bad_steps 0); '
        "no such step changed a weight; rank 1's loss was not finite; see "
    )
    status = json.loads((folder / 'status.json').read_text())
    assert (status['state'], status['exit_code'], status['message']) == ('failed', 3, line)
    record = record_of(folder)
    assert [[step['loss'] for step in seen['micro_steps']] for seen in record['ranks']][1] == ['nan']
    assert math.isfinite(record['ranks'][0]['micro_steps'][0]['loss'])
    assert str(guilty) in [sample['path'] for sample in record['ranks'][1]['micro_steps'][0]['samples']]
    state = load(folder)
    assert state['step'] == 2
    finite = all(value.isfinite().all() for value in state['model'].values())
    assert finite
    codes = ', '.join(map(str, done.codes))
    measured(f'NaN on rank 1 of 2: exit codes {codes} of the ranks; weights finite: {finite}; loads')

    shown = replay(folder, capsys)
    assert shown.splitlines()[1].startswith('rank 1, micro-step 0: loss nan')
    assert 'first module whose output is not finite: patch_embed.proj (Conv2d); the images that went in' in shown
    other = replay(folder, capsys, '--rank', '0')
    assert 'rank 0, micro-step 0: loss ' in other
    assert '  finite in float32: ' in other
    guilty.unlink()
    with pytest.raises(UserError, match=f'{guilty.name}, image {index} of the run, is no longer where it was'):
        replay(folder, capsys)


# --------------------------------------------------------------------------
# the replay


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    ('stage', 'more', 'module'),
    [
        ('pretrain', [], 'blocks.2.mlp.fc1'),
        ('pretrain', ['--model', 'a2mim_resnet_tiny'], 'encoder.layer2.0.conv1'),
        ('finetune', MIXED, 'blocks.1.attn.qkv'),
    ],
)
def test_a_poisoned_weight_is_found(stage, more, module, images, tmp_path, monkeypatch, capsys, measured):
    name = 'create_model' if stage == 'pretrain' else 'create_classifier'

    create = getattr(MAINS[stage], name)

    def poisoned(*args, **kwargs):
        core = create(*args, **kwargs)
        core.get_submodule(module).weight.data[0, 0] = math.inf
        return core

    with monkeypatch.context() as patch:
        patch.setattr(MAINS[stage], name, poisoned)
        diverge(stage, images, tmp_path, *FLAGS, *more, '--max_bad_steps', '0')
    shown = replay(tmp_path, capsys)
    found = re.findall(r'first module whose output is not finite: (\S+) \(\w+\), whose weight itself is not; ', shown)
    assert found == [module] * 2  # of each micro-step
    measured(f'replay of a weight set to inf in {module}: names {found[0]}')


@pytest.mark.parametrize(('stage', 'more'), [('pretrain', []), ('pretrain', RESNET), ('finetune', MIXED)])
def test_the_replay_is_the_very_step(stage, more, images, tmp_path, monkeypatch, capsys):
    """Images, augmentation, masks, mixup and drop path: the same loss, in the middle of an epoch and a resumed one."""
    flags = [*FLAGS, *more, '--reprob', '0.5'] if stage == 'finetune' else [*FLAGS, *more]
    spoil(monkeypatch, stage, range(6, 100), bad_gradient)
    diverge(stage, images, tmp_path, *flags, '--max_bad_steps', '0')
    [seen] = record_of(tmp_path)['ranks']
    shown = replay(tmp_path, capsys)
    for micro, step in enumerate(seen['micro_steps']):
        terms = ''.join(f', {name} {value:.6g}' for name, value in step['terms'].items())
        assert f'rank 0, micro-step {micro}: loss {step["loss"]:.6g}{terms}\n' in shown
    assert shown.count('  first module whose gradient is not finite: ') == 2  # the root, which is here again
    assert replay(tmp_path, capsys, '--amp_dtype', 'bf16') != shown


def test_replay_refuses(images, tmp_path, monkeypatch, capsys):
    """What is missing, foreign, or of another step, in one line."""
    with pytest.raises(UserError, match=r'cannot read .*diagnosis.json: No such file'):
        replay(tmp_path, capsys)
    for text in ('', '[]', '{"epoch": 1}', '{"ranks": 3}'):
        (tmp_path / 'diagnosis.json').write_text(text)
        with pytest.raises(UserError, match='is not a diagnosis that a run has written'):
            replay(tmp_path, capsys)
    (tmp_path / 'diagnosis.json').unlink()
    spoil(monkeypatch, 'pretrain', range(100))
    diverge('pretrain', images, tmp_path, *FLAGS)
    with pytest.raises(UserError, match='--rank 1: the run had ranks 0 to 0'):
        replay(tmp_path, capsys, '--rank', '1')
    weights = load(tmp_path, 'diagnosis.pth')
    checkpoint.save(tmp_path / 'diagnosis.pth', weights | {'step': 9})
    with pytest.raises(UserError, match=r'diagnosis.pth is not of the step that .*diagnosis.json describes'):
        replay(tmp_path, capsys)
    checkpoint.save(tmp_path / 'diagnosis.pth', weights | {'model': {'a': torch.zeros(1)}})
    with pytest.raises(UserError, match='is of another architecture'):
        replay(tmp_path, capsys)
    (tmp_path / 'diagnosis.pth').unlink()
    with pytest.raises(UserError, match='does not exist'):
        replay(tmp_path, capsys)


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


class Attention(nn.Module):
    """Overflows between its two modules."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.proj(self.qkv(x) * 1e38 * 1e38)


def watched(*modules: nn.Module, loss=lambda x: x.mean()) -> tuple[replay_step.Watch, float]:
    torch.manual_seed(0)
    core = nn.Sequential(*modules)
    watch = replay_step.Watch(core)
    watch.begin()
    value = loss(core(torch.ones(2, 4)))
    value.backward()
    return watch, value.item()


def test_findings():
    """Overflow in a module and between two, the slope of a root at zero, and one behind the last module."""
    big = nn.Linear(4, 4)
    nn.init.constant_(big.weight, 3e38)
    found = replay_step.forward_findings(*watched(nn.ReLU(), big))
    assert found == 'first module whose output is not finite: 1 (Linear); the largest absolute value that went in is 1'
    found = replay_step.forward_findings(*watched(Attention()))
    assert found.startswith('first module whose output is not finite: 0.proj (Linear); what went in was not finite ')
    assert 'it began after 0.qkv (Linear), whose output is up to ' in found
    found = replay_step.forward_findings(*watched(nn.Linear(4, 4), loss=lambda x: x.sum() / 0))
    assert found.startswith('the output of the network is finite, its loss is not: it is up to ')

    zero = nn.Linear(4, 4)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    watch, loss = watched(nn.Linear(4, 4), nn.ReLU(inplace=True), zero, Root(), nn.Linear(4, 4))
    assert replay_step.forward_findings(watch, loss) == ''
    assert replay_step.backward_findings(watch).startswith(
        'first module whose gradient is not finite: 3 (Root), that of'
    )
    watch, _ = watched(nn.Linear(4, 4), loss=lambda x: (x * 0).sum().sqrt())
    assert replay_step.backward_findings(watch) == 'first gradient that is not finite: behind the output of 0 (Linear)'
    watch, _ = watched(nn.Linear(4, 4), nn.GELU())
    assert replay_step.backward_findings(watch) == ''
    assert replay_step.finite_findings(watch, 'float32').startswith('finite in float32: the largest gradient is ')
