"""What the engines do for networks with convolutions and BatchNorm, on a tiny ResNet."""

import json
import re
import shutil

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from training import MAINS, draw_plan, load, run, same, train

import main_finetune
import models_a2mim
from util import dist, optim
from util.data import datasets
from util.errors import UserError
from util.run import Run
from util.training import memory_format

FLAGS = ['--model', 'a2mim_resnet_tiny', '--batch_size', '16', '--epochs', '2', '--warmup_epochs', '1', '--lr', '1e-3']


def test_synchronised_batchnorm_keeps_its_activation(monkeypatch):
    """timm's BatchNormAct2d applies one; torch's conversion would drop it without a word."""
    monkeypatch.setattr(dist, 'active', lambda: True)
    core = timm.create_model('mobilenetv3_small_050', num_classes=3)
    acts = [type(module.act) for module in core.modules() if isinstance(module, BatchNormAct2d)]
    assert set(acts) - {torch.nn.Identity}
    synced = dist.sync_batchnorm(core, torch.device('cuda'))
    norms = [module for module in synced.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert [type(norm.act) for norm in norms] == acts


def test_compiled_synchronised_batchnorm_is_refused(images, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, 'will_synchronise', lambda core, device: True)
    with pytest.raises(UserError, match='--compile: torch cannot compile SyncBatchNorm'):
        train('pretrain', images, tmp_path, *FLAGS, '--compile')


def test_bad_steps_leave_running_statistics(images):
    """An image that is not finite: neither weights nor running statistics change; the next good one moves both."""
    model = models_a2mim.a2mim_resnet_tiny(img_size=32)
    groups = optim.param_groups(model, models_a2mim.param_rules(model), 0.05)
    guard = optim.GuardedOptimizer(model, optim.adamw(groups, 1e-3, (0.9, 0.95)), torch.device('cpu'), False, None)
    plan = draw_plan(model, 4, 0)

    def step(imgs):
        loss, _ = model(imgs, plan)
        guard.backward(loss)
        guard.step()
        return {key: value.clone() for key, value in model.state_dict().items() if 'num_batches' not in key}

    good = torch.randn(4, 3, 32, 32)
    first = step(good)
    bad = good.clone()
    bad[0, 0, 0, 0] = torch.inf
    assert same(step(bad), first)
    moved = step(good)
    assert not any(torch.equal(moved[key], first[key]) for key in first if 'running' in key)


def parse(*flags):
    return MAINS['finetune'].get_args_parser().parse(list(flags))


@pytest.mark.parametrize(
    ('name', 'convolves'), [('resnet10t', True), ('convnext_atto', True), ('vit_tiny_patch16_224', False)]
)
def test_memory_format(name, convolves):
    """NHWC by default for networks with convolutions that overlap."""
    core = timm.create_model(name)
    default = torch.channels_last if convolves else torch.contiguous_format
    assert memory_format(parse(), core) is default
    assert memory_format(parse('--channels_last'), core) is torch.channels_last
    assert memory_format(parse('--no_channels_last'), core) is torch.contiguous_format
    imgs = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    batch = datasets.Normalisation.of((0.5,) * 3, (0.2,) * 3, torch.device('cpu'), default)(imgs)
    assert batch.is_contiguous(memory_format=default)


def test_channels_last_changes_no_loss(images, tmp_path):
    """Over eight steps; and it reaches weights, moments and averages."""
    losses = {}
    for last, flag in ((True, '--channels_last'), (False, '--no_channels_last')):
        saved = train('finetune', images, tmp_path / flag, *FLAGS, flag, '--use_ema')
        losses[last] = [json.loads(line)['train_loss'] for line in (tmp_path / flag / 'log.txt').open()]
        moments = [state['exp_avg'] for state in saved['optimizer']['state'].values()]
        for weights in (saved['model'].values(), saved['ema'].values(), moments):
            kernels = [w for w in weights if w.ndim == 4 and w.shape[1] > 1 and w.shape[2] > 1]
            assert len(kernels) == 9  # 7x7, and two of 3x3 in each block
            assert all(w.is_contiguous(memory_format=torch.channels_last) is last for w in kernels)
            assert all(w.is_contiguous() is not last for w in kernels)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_resumed_equals_uninterrupted(images, tmp_path, monkeypatch):
    """With LAMB's counter, running statistics, and weights in NHWC: to the bit, from the middle of an epoch."""
    flags = [*FLAGS, '--opt', 'lamb', '--clip_grad', '1', '--use_ema', '--ema_warmup_epochs', '1', '--criterion', 'bce']
    flags += ['--mixup', '0.1', '--cutmix', '1', '--drop_path', '0.05', '--save_freq_steps', '1']

    def save_and_copy(self, name, epoch, step, closed=True, save=Run.save, **more):
        save(self, name, epoch, step, closed, **more)
        if (epoch.number, step) == (0, 3):
            shutil.copy(self.args.output_dir / name, tmp_path / 'middle.pth')

    monkeypatch.setattr(Run, 'save', save_and_copy)
    whole = train('finetune', images, tmp_path / 'whole', *flags)
    resumed = train('finetune', images, tmp_path / 'resumed', *flags, '--resume', tmp_path / 'middle.pth')
    assert load(tmp_path, 'middle.pth')['model']['bn1.num_batches_tracked'] == 3
    assert whole['model']['bn1.num_batches_tracked'] == 8
    assert {int(group['step']) for group in whole['optimizer']['param_groups']} == {8}
    for key in ('model', 'ema', 'optimizer', 'record'):
        assert same(resumed[key], whole[key]), key


def test_evaluation_at_another_size(images, tmp_path, capsys, monkeypatch):
    """Trained at 32 and tested at 40, by --eval too; a network for one size says so."""
    sides = []

    def forward(self, x, forward=timm.models.resnet.ResNet.forward):
        sides.append((self.training, x.shape[-1]))
        return forward(self, x)

    monkeypatch.setattr(timm.models.resnet.ResNet, 'forward', forward)
    flags = [*FLAGS, '--eval_size', '40', '--crop_pct', '1']
    train('finetune', images, tmp_path, *flags)
    assert set(sides) == {(True, 32), (False, 40)}
    line = re.findall(r'^\* Acc@1 .*', capsys.readouterr().out, re.MULTILINE)[-1]
    train('finetune', images, tmp_path, *flags, '--eval', '--resume', tmp_path / 'checkpoint-last.pth')
    assert line in capsys.readouterr().out
    with pytest.raises(UserError, match=r'mirl_vit_tiny cannot take 2 images of 40 pixels: .*40'):
        train('finetune', images, tmp_path / 'vit', *flags, '--model', 'mirl_vit_tiny')


def test_repeated_augmentation(images, tmp_path):
    """Other images, as many steps; workers change nothing; not to be changed on resume."""
    plain = train('finetune', images, tmp_path / 'plain', *FLAGS)
    flags = [*FLAGS, '--repeated_aug', '3']
    three = train('finetune', images, tmp_path / 'three', *flags)
    assert not same(three['model'], plain['model'])
    assert three['steps'] == plain['steps']
    assert same(train('finetune', images, tmp_path / 'workers', *flags, '--num_workers', '2')['model'], three['model'])
    with pytest.raises(UserError, match='repeated_aug: 3 then, 1 now'):
        train('finetune', images, tmp_path / 'three', *FLAGS, '--resume', 'auto')


def test_rule_kwargs_reach_the_rules(images, tmp_path):
    rates = []
    for more in ([], ['--rule_kwargs', 'gamma_as_weight=False']):
        saved = train('pretrain', images, tmp_path / str(len(rates)), *FLAGS, '--weight_decay', '0.3', *more)
        [group] = [g for g in saved['optimizer']['param_groups'] if 'mask_gamma' in g['names']]
        rates.append((group['lr_scale'], group['weight_decay']))
    assert rates == [(1.0, 0.3), (0.1, 0.0)]
    with pytest.raises(UserError, match=r'param_rules has no option gamma_weight; did you mean gamma_as_weight\?'):
        train('pretrain', images, tmp_path / 'not', *FLAGS, '--rule_kwargs', 'gamma_weight=True')


@pytest.mark.faults  # four runs of two ranks
def test_two_ranks(images, tmp_path, monkeypatch):
    """Statistics are rank 0's wherever ranks meet: evaluated as saved, and the same to the bit after a resume."""
    flags = [*FLAGS, '--batch_size', '8', '--accum_iter', '2', '--save_freq_steps', '1']
    tuned = run('finetune', images, tmp_path / 'tuned', *flags, '--use_ema', ranks=2)
    assert tuned.returncode == 0, tuned.stderr
    assert tuned.stdout.count('BatchNorm keeps its running statistics per process; ') == 1
    logged = json.loads((tmp_path / 'tuned' / 'log.txt').read_text().splitlines()[-1])
    reports = []
    monkeypatch.setattr(main_finetune, 'report', lambda stats, *reader, **labelled: reports.append(stats))
    source = ['--eval', '--resume', tmp_path / 'tuned' / 'checkpoint-last.pth']
    for prefix, more in (('test', []), ('test_ema', ['--use_ema'])):
        train('finetune', images, tmp_path / 'tuned', *flags, *source, *more)
        assert reports[-1] == {key: pytest.approx(logged[f'{prefix}_{key}'], rel=1e-6) for key in reports[-1]}

    flags += ['--epochs', '1', '--warmup_epochs', '0']
    assert run('pretrain', images, tmp_path / 'whole', *flags, ranks=2).returncode == 0
    assert run('pretrain', images, tmp_path / 'part', *flags, ranks=2, fault='exit:0:1').returncode == 9
    resumed = run('pretrain', images, tmp_path / 'part', *flags, '--resume', 'auto', ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    whole, part = load(tmp_path / 'whole'), load(tmp_path / 'part')
    assert whole['model']['encoder.bn1.num_batches_tracked'] == 4
    assert all(same(part[key], whole[key]) for key in ('model', 'optimizer'))


def test_gradient_checkpointing(images, tmp_path):
    """The same run, byte for byte, BatchNorm's running statistics included."""
    flags = [*FLAGS, '--epochs', '1', '--warmup_epochs', '0', '--drop_path', '0.1']
    kept = train('finetune', images, tmp_path / 'kept', *flags)
    made_again = train('finetune', images, tmp_path / 'again', *flags, '--grad_checkpoint')
    assert same(made_again['optimizer'], kept['optimizer'])
    assert same(made_again['model'], kept['model'])
