"""Schedules, parameter groups, optimisers and their guard, averages of the weights."""

import math

import pytest
import timm.optim
import timm.utils
import torch
from golden import golden
from torch import nn

import main_finetune
from scripts import finetune_detection, finetune_segmentation
from util import build, optim
from util.optim import (
    OPTIMIZERS,
    GuardedOptimizer,
    Lamb,
    WeightAverage,
    adamw,
    learning_rate,
    load_optimizer_state,
    param_groups,
)
from util.training import Training

CPU = torch.device('cpu')
RULES = {'weight': (0, 1.0, True), 'bias': (0, 1.0, False)}
DECAY = {'lars': 0.0}  # which takes no other


# --------------------------------------------------------------------------
# learning rates


def test_schedules():
    cosine = dict(lr=1.0, epochs=100, warmup_epochs=10, min_lr=0.1)
    assert learning_rate(5, **cosine) == 0.5
    assert learning_rate(10, **cosine) == 1.0
    assert learning_rate(55, **cosine) == pytest.approx(0.55)
    assert learning_rate(55.9, **cosine, per_epoch=True) == learning_rate(55, **cosine)
    assert learning_rate(5.5, **cosine, per_epoch=True) == 0.55  # the warm-up stays per iteration
    steps = dict(lr=1.0, epochs=100, warmup_epochs=10, sched='step', decay_epochs=(70, 90), decay_rate=0.1)
    assert [learning_rate(e, **steps) for e in (5, 10, 69.9, 70, 95)] == pytest.approx([0.5, 1, 1, 0.1, 0.01])


MMCV = golden('a2mim/optim_and_lr.json')['lr']


@pytest.mark.parametrize('name', MMCV)
def test_schedules_of_mmcv(name):
    """Every point of its step, StepFixCosine (`warmup` start) and Cosine (`zero` start) schedules."""
    case = MMCV[name]
    hook, cfg, steps = case['hook'], case['cfg'], case['iters_per_epoch']
    options = dict(lr=case['base_lr'], epochs=case['epochs'], warmup_shape='scaled')
    if 'warmup' in cfg:
        assert (cfg['warmup'], cfg['warmup_by_epoch']) == ('linear', True)
        ratio = 0.0 if hook.startswith('StepFix') else cfg['warmup_ratio']  # which that one ignores
        options |= dict(warmup_epochs=cfg['warmup_iters'], warmup_lr_ratio=ratio)
    if hook == 'StepLrUpdaterHook':
        options |= dict(sched='step', decay_epochs=tuple(cfg['step']), decay_rate=cfg.get('gamma', 0.1))
    else:
        start = 'warmup' if hook.startswith('StepFix') else 'zero'
        options |= dict(min_lr=cfg['min_lr'], cosine_start=start, per_epoch=cfg.get('by_epoch', True))
    for point, theirs in case['lr_at_iter'].items():
        # the absolute bound is for their own rounding of 1 - (1 - ratio) at the very first step
        assert learning_rate(int(point) / steps, **options) == pytest.approx(theirs, rel=1e-12, abs=1e-18), point


SEGMENTATION = golden('segmentation/schedule.json')['cases']


@pytest.mark.parametrize('name', SEGMENTATION)
def test_schedules_by_steps(name, tmp_path):
    """mmcv's 'poly' with a minimum that is the same for every group: by steps, and as a run of rounds sets it."""
    case = SEGMENTATION[name]
    bases, steps, config = case['base_lr'], case['max_iters'], case['config']
    warm_up, power, least = config.get('warmup_iters', 0), config['power'], config['min_lr']
    options = dict(epochs=steps, warmup_epochs=warm_up, warmup_shape='scaled', sched='poly', power=power, min_lr=least)
    options['warmup_lr_ratio'] = config.get('warmup_ratio', 0.0)
    layers = nn.ModuleDict({f'{i}': nn.Linear(1, 1, bias=False) for i in range(len(bases))})
    rules = {f'{i}.weight': (0, base / max(bases), True) for i, base in enumerate(bases)}
    guard = GuardedOptimizer(layers, adamw(param_groups(layers, rules, 0), 1, (0.9, 0.95)), CPU, False, None)
    argv = ['--steps', steps, '--lr', max(bases), '--min_lr', least, '--lr_power', power]
    argv += ['--warmup_steps', warm_up, '--warmup_lr_ratio', options['warmup_lr_ratio']]
    args = finetune_segmentation.get_args_parser().parse(list(map(str, argv)))
    training = Training(args, layers, layers, guard, build.epoch_batches(args, 100), CPU)
    for step, theirs in case['lr_at_iter'].items():
        found = [learning_rate(int(step), lr=base, **options) for base in bases]
        assert found == pytest.approx(theirs, rel=1e-8, abs=0), step
        training.set_lr(int(step) / args.eval_freq)
        rates = {name: group['lr'] for group in guard.inner.param_groups for name in group['names']}
        assert [rates[f'{i}.weight'] for i in range(len(bases))] == pytest.approx(theirs, rel=1e-8, abs=0), step


DETECTION = golden('detection/optim_vitdet.json')['schedules']


@pytest.mark.parametrize('case', DETECTION, ids=lambda case: case['name'])
def test_steps_of_the_learning_rate(case):
    """detectron2's, whose milestones are steps: as a run of rounds sets it, before and after each."""
    argv = ['--steps', case['iterations'], '--decay_steps', *case['milestones'], '--lr', 1]
    argv += ['--warmup_steps', case['warmup'], '--warmup_lr_ratio', case['warmup_factor']]
    args = finetune_detection.get_args_parser().parse(list(map(str, argv)))
    schedule = optim.schedule(args, 1)
    rates = [schedule(step // args.eval_freq + step % args.eval_freq / args.eval_freq) for step, _ in case['values']]
    assert rates == pytest.approx([rate for _, rate in case['values']], rel=1e-12)
    default = finetune_detection.get_args_parser().parse(['--steps', '184375'])
    assert default.decay_steps == [163_889, 177_546]


def test_smallest_learning_rate_of_scaled_groups():
    """A common factor of MAE's curve; with --min_lr_absolute, each group's own curve down to the same minimum."""
    layer = nn.Linear(2, 2)
    groups = param_groups(layer, {'weight': (0, 1.0, True), 'bias': (0, 0.1, True)}, 0.05)
    guard = GuardedOptimizer(layer, adamw(groups, 1.0, (0.9, 0.95)), torch.device('cpu'), False, None)
    argv = ['--lr', '1', '--min_lr', '0.01', '--epochs', '10', '--warmup_epochs', '2', '--warmup_shape', 'scaled']
    for flags in ([], ['--min_lr_absolute']):
        args = main_finetune.get_args_parser().parse([*argv, *flags])
        sampler = build.epoch_batches(args, 1024)
        training = Training(args, layer, layer, guard, sampler, torch.device('cpu'))
        for epoch in (0, 1.5, 2, 4.25, 9.9, 10):
            full = training.set_lr(epoch)
            ours = {group['lr_scale']: group['lr'] for group in guard.inner.param_groups}
            scaled = training.schedule(epoch, lr=0.1)  # mmcv: a curve of the group's own
            assert ours == {1.0: full, 0.1: pytest.approx(scaled if flags else full * 0.1, rel=1e-12)}
    assert ours[0.1] == pytest.approx(0.01)


# --------------------------------------------------------------------------
# groups and optimisers


def test_layer_decay_and_scales():
    layer = torch.nn.Linear(2, 2)
    groups = param_groups(layer, {'weight': (1, 1.0, True), 'bias': (3, 0.1, False)}, 0.05, layer_decay=0.5)
    assert {group['names'][0]: (group['lr_scale'], group['weight_decay']) for group in groups} == {
        'weight': (0.25, 0.05),
        'bias': (0.1, 0.0),
    }


def guarded(
    layer: nn.Module,
    name: str = 'adamw',
    fp16: bool = False,
    clip_grad: float | None = None,
    max_bad_steps: int | None = None,
) -> GuardedOptimizer:
    optimizer = OPTIMIZERS[name](param_groups(layer, RULES, DECAY.get(name, 0.05)), 1e-2, (0.9, 0.95))
    return GuardedOptimizer(layer, optimizer, torch.device('cpu'), fp16, clip_grad, max_bad_steps)


def train_layer(guard: GuardedOptimizer, layer: nn.Module, factors: list[float]) -> None:
    for i, factor in enumerate(factors):
        inputs = torch.randn(2, 4, generator=torch.Generator().manual_seed(i))
        guard.backward(layer(inputs).square().mean() * factor)
        guard.step()


def everything(guard: GuardedOptimizer) -> list:
    """Weights, moments and counters, as they would be saved."""
    saved = guard.inner.state_dict()
    values = [value for state in saved['state'].values() for value in state.values()]
    counters = [group['step'] for group in saved['param_groups'] if 'step' in group]
    return [torch.as_tensor(value).clone().float() for value in (*guard.params, *values, *counters)]


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_bad_step_changes_nothing(name):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    guard = guarded(layer, name, clip_grad=1)
    train_layer(guard, layer, [1.0])
    assert guard.counts() == {'streak': 0, 'bad_steps': 0}
    before = everything(guard)
    for factor in (math.nan, math.inf):
        train_layer(guard, layer, [factor])
        assert all(map(torch.equal, everything(guard), before))
    assert guard.counts() == {'streak': 2, 'bad_steps': 2}
    train_layer(guard, layer, [1.0])
    assert not torch.equal(layer.weight, before[0])
    assert guard.counts() == {'streak': 0, 'bad_steps': 2}


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('fp16', [False, True])
def test_a_tripped_guard_stays_so(name, fp16):
    """One bad step too many in a row, and good ones are left out as well, however late the host looks."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    guard = guarded(layer, name, fp16, max_bad_steps=2)
    guard.scaler = torch.amp.GradScaler('cpu', init_scale=16, enabled=fp16)
    train_layer(guard, layer, [1.0, math.nan, math.nan, 1.0, 1.0])  # as many as are allowed
    assert guard.counts() == {'streak': 0, 'bad_steps': 2}
    before = everything(guard)
    train_layer(guard, layer, [math.nan] * 3 + [1.0] * 4)
    assert all(map(torch.equal, everything(guard), before))
    assert guard.counts() == {'streak': 7, 'bad_steps': 9}
    assert guard.loss_scale() == (1.0 if fp16 else None)  # halved by two bad steps, and by two of the last


def test_how_many_bad_steps_are_allowed():
    assert [guarded(nn.Linear(4, 4), fp16=fp16).allowed for fp16 in (False, True)] == [3, 20]
    layer = nn.Linear(4, 4)
    guard = guarded(layer, fp16=True, max_bad_steps=0)
    train_layer(guard, layer, [math.nan])
    assert guard.counts()['streak'] > guard.allowed == 0


@pytest.mark.parametrize(('saved', 'taken'), [(2, 2), (9, 3)])
def test_the_streak_goes_on(saved, taken):
    """From a checkpoint; one that is longer than now allowed does not spoil steps that are good."""
    layer = nn.Linear(4, 4)
    guard = guarded(layer)
    guard.restore(guard.state() | {'guard': {'streak': saved, 'bad_steps': 11}})
    assert guard.counts() == {'streak': taken, 'bad_steps': 11}
    train_layer(guard, layer, [1.0])
    assert guard.counts() == {'streak': 0, 'bad_steps': 11}


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('fp16', [False, True])
def test_a_norm_that_overflows(name, fp16):
    """Every gradient is finite, their norm is not: such a step is bad, too."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    guard = guarded(layer, name, fp16)
    guard.scaler = torch.amp.GradScaler('cpu', init_scale=1, enabled=fp16)
    before = everything(guard)
    train_layer(guard, layer, [1e25])
    assert all(map(torch.equal, everything(guard)[: len(before)], before))
    assert guard.counts() == {'streak': 1, 'bad_steps': 1}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_bad_first_step(name):
    """Moments start from zero all the same, and the counter from one."""
    ends = []
    for factors in ([math.nan, 1.0], [1.0]):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        guard = guarded(layer, name)
        train_layer(guard, layer, factors[:-1])
        everything(guard)  # saving puts a counter on the host right
        inputs = torch.ones(2, 4)
        guard.backward(layer(inputs).square().mean())
        guard.step()
        ends.append(everything(guard))
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_fp16_overflow(name):
    """Steps that the loss scale spoils are left out, counters included, and it shrinks until none is."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    guard = guarded(layer, name, fp16=True)
    before = everything(guard)
    train_layer(guard, layer, [1e36])  # times 2 ** 16: overflow
    after = everything(guard)[: len(before)]
    assert all(map(torch.equal, after, before))
    assert guard.scaler.get_scale() == 2**15
    train_layer(guard, layer, [1.0])
    assert not torch.equal(layer.weight, before[0])
    counters = [value for value in everything(guard)[2:] if value.ndim == 0]
    assert set(map(float, counters)) == (set() if name in ('lars', 'sgd') else {1.0})  # which count nothing
    assert guard.counts() == {'streak': 0, 'bad_steps': 1}


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('clip_grad', [0.5, None])
def test_clipping(name, clip_grad):
    """The first moment is a tenth of the first gradient, clipped if asked; LARS's and SGD's, of a bias, is all."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    guard = guarded(layer, name, clip_grad=clip_grad)
    guard.backward(1e3 * layer(torch.ones(2, 4)).square().mean())
    gradient = layer.bias.grad.clone()
    norm = guard.step()
    assert norm > 100
    if name in ('lars', 'sgd'):
        ours = guard.inner.state[layer.bias]['momentum_buffer'].norm() / gradient.norm()
        assert ours == pytest.approx((clip_grad or norm.item()) / norm.item(), rel=1e-4)
        return
    moments = [guard.inner.state[p]['exp_avg'] for p in layer.parameters()]
    assert torch.nn.utils.get_total_norm(moments) == pytest.approx(0.1 * (clip_grad or norm.item()), rel=1e-4)


@pytest.mark.parametrize('name', ['lamb', 'lars'])
def test_timms_optimizers_and_the_average_never_wait(name):
    """On the meta device, where nothing can be read."""
    layer = nn.Linear(4, 4, device='meta')
    ema = WeightAverage(nn.Linear(4, 4), 0.9)
    ema.module.to('meta')
    groups = param_groups(layer, RULES, DECAY.get(name, 0.05))
    guard = GuardedOptimizer(layer, OPTIMIZERS[name](groups, 1e-2, (0.9, 0.95)), torch.device('meta'), False, 1.0)
    for _ in range(2):
        guard.backward(layer(torch.ones(2, 4, device='meta')).square().mean())
        guard.step()
        ema.update(layer, 0, guard.skipped)
    for reads in (guard.inner.state_dict, guard.counts)[name == 'lars' :]:
        with pytest.raises((RuntimeError, NotImplementedError)):
            reads()


def test_lamb_is_timms():
    """Without clipping and away from bad steps; weights that do not decay have no trust ratio."""
    ends = []
    for make in (
        lambda groups: Lamb(groups, lr=1e-2, max_grad_norm=None),
        lambda groups: timm.optim.Lamb(groups, lr=1e-2, max_grad_norm=None),
    ):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        guard = GuardedOptimizer(layer, make(param_groups(layer, RULES, 0.05)), torch.device('cpu'), False, None)
        train_layer(guard, layer, [1.0] * 5)
        ends.append([*layer.parameters()])
    assert all(map(torch.equal, *ends))

    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    guard, start = guarded(layer, 'lamb'), [param.detach().clone() for param in layer.parameters()]
    assert all(group['eps'] == 1e-6 and group['betas'] == (0.9, 0.95) for group in guard.inner.param_groups)
    train_layer(guard, layer, [1.0])
    moved = [param.detach() - old for param, old in zip(layer.parameters(), start, strict=True)]
    assert moved[0].norm() == pytest.approx(1e-2 * start[0].norm().item(), rel=1e-5)  # a share of the weights' norm
    assert moved[1].abs() == pytest.approx(torch.full((4,), 1e-2), rel=1e-3)  # Adam's first step: the learning rate


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimizer_state_by_name(name):
    """A resumed optimiser goes on to the bit, in whatever groups the parameters now are, with the counter."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    guard = guarded(layer, name)
    train_layer(guard, layer, [1.0] * 3)
    saved, weights = guard.inner.state_dict(), {k: v.clone() for k, v in layer.state_dict().items()}
    saved = {**saved, 'state': {i: {k: v.clone() for k, v in s.items()} for i, s in saved['state'].items()}}
    saved['param_groups'] = [dict(group) for group in saved['param_groups']]
    saved['param_groups'] = [g | {'step': int(g['step'])} if 'step' in g else g for g in saved['param_groups']]
    train_layer(guard, layer, [1.0] * 3)

    again = nn.Linear(4, 4)
    again.load_state_dict(weights)
    rules = {'weight': (0, 1.0, True), 'bias': (0, 1.0, False)}
    groups = param_groups(again, rules, DECAY.get(name, 0.05))[::-1]
    other = GuardedOptimizer(again, OPTIMIZERS[name](groups, 1e-2, (0.9, 0.95)), torch.device('cpu'), False, None)
    load_optimizer_state(other.inner, saved)
    train_layer(other, again, [1.0] * 3)
    assert all(map(torch.equal, again.parameters(), layer.parameters()))


def test_moments_lie_as_their_weights_do():
    """Fused kernels walk both in memory order: a state saved from the other layout must follow the weights."""
    conv = nn.Conv2d(2, 3, 3)
    rules = {'weight': (0, 1.0, True), 'bias': (0, 1.0, False)}
    first = adamw(param_groups(conv, rules, 0.05), 1e-2, (0.9, 0.95))
    conv(torch.randn(1, 2, 5, 5)).square().mean().backward()
    first.step()
    last = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    second = adamw(param_groups(last, rules, 0.05), 1e-2, (0.9, 0.95))
    load_optimizer_state(second, first.state_dict())
    moment = second.state[last.weight]['exp_avg']
    assert torch.equal(moment, first.state[conv.weight]['exp_avg'])
    assert moment.stride() == last.weight.stride() != conv.weight.stride()


# --------------------------------------------------------------------------
# averages


@pytest.mark.parametrize('warmup_steps', [0, 40])
def test_decay_of_the_average(warmup_steps):
    """From below: (1 + t) / (10 + t), or linearly from 0.9 of it over the warm-up."""
    ema = WeightAverage(nn.Linear(1, 1), 0.99, warmup_steps)
    expected = {0: 0.1, 10: 0.55, 20: 0.7, 890: 0.99, 10**6: 0.99}
    if warmup_steps:
        expected = {0: 0.891, 20: 0.9405, 39: 0.987525, 40: 0.99, 41: 0.99, 10**6: 0.99}
    assert {step: ema.get_decay(step) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_buffers_are_not_averaged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ema = WeightAverage(model, 0.5, warmup_steps=1)
    start = model[0].weight.detach().clone()
    nn.init.ones_(model[0].weight)
    model(torch.randn(8, 4))
    ema.update(model, 7, torch.tensor(0.0))
    assert torch.allclose(ema.module[0].weight, start + (1 - start) * 0.5)
    assert all(map(torch.equal, ema.module.buffers(), model.buffers()))
    assert ema.module[1].running_mean.any()


def test_a_skipped_step_moves_no_average():
    """To the bit; any other step moves it as timm would."""
    torch.manual_seed(0)
    model, last = nn.Linear(4, 4), nn.Linear(4, 4)
    ema, timms = (average(model, 0.9) for average in (WeightAverage, timm.utils.ModelEmaV3))
    start = ema.module.weight.clone()
    ema.update(last, 10**6, torch.tensor(1.0))
    assert torch.equal(ema.module.weight, start)
    ema.update(last, 10**6, torch.tensor(0.0))
    timms.update(last)
    assert torch.allclose(ema.module.weight, timms.module.weight, rtol=1e-6)
    assert not torch.equal(ema.module.weight, start)
