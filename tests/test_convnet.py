"""What the machinery does for networks with convolutions and BatchNorm, on a tiny ResNet."""

import json
import shutil

import convnet
import pytest
import timm
import torch
from training import MAINS, load, make_images, same, train

import main_pretrain
from util import config, datasets
from util.errors import UserError
from util.run import Run

FLAGS = ['--model', 'tiny_resnet', '--batch_size', '16', '--epochs', '2', '--warmup_epochs', '1', '--lr', '1e-3']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    monkeypatch.setattr(main_pretrain, 'METHODS', (*main_pretrain.METHODS, convnet))


def parse(*flags):
    return MAINS['finetune'].get_args_parser().parse(list(flags))


@pytest.mark.parametrize(
    ('name', 'convolves'), [('resnet10t', True), ('convnext_atto', True), ('vit_tiny_patch16_224', False)]
)
def test_memory_format(name, convolves):
    """NHWC by default for networks with convolutions that overlap."""
    with torch.device('meta'):
        core = timm.create_model(name)
    default = torch.channels_last if convolves else torch.contiguous_format
    assert config.memory_format(parse(), core) is default
    assert config.memory_format(parse('--channels_last'), core) is torch.channels_last
    assert config.memory_format(parse('--no_channels_last'), core) is torch.contiguous_format
    imgs = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    batch = datasets.to_float(imgs, *datasets.statistics((0.5,) * 3, (0.2,) * 3, torch.device('cpu'), default))
    assert batch.is_contiguous(memory_format=default)


def test_channels_last_changes_no_loss(data, tmp_path):
    """Over eight steps; and it reaches weights, moments and averages."""
    losses = {}
    for last, flag in ((True, '--channels_last'), (False, '--no_channels_last')):
        saved = train('finetune', data, tmp_path / flag, *FLAGS, flag, '--use_ema')
        losses[last] = [json.loads(line)['train_loss'] for line in (tmp_path / flag / 'log.txt').open()]
        moments = [state['exp_avg'] for state in saved['optimizer']['state'].values()]
        for weights in (saved['model'].values(), saved['ema'].values(), moments):
            kernels = [w for w in weights if w.ndim == 4 and w.shape[1] > 1 and w.shape[2] > 1]
            assert len(kernels) == 9
            assert all(w.is_contiguous(memory_format=torch.channels_last) is last for w in kernels)
            assert all(w.is_contiguous() is not last for w in kernels)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_resumed_equals_uninterrupted(data, tmp_path, monkeypatch):
    """With LAMB's counter, BatchNorm's statistics, and weights in NHWC: to the bit, from the middle of an epoch."""
    flags = [*FLAGS, '--opt', 'lamb', '--clip_grad', '1', '--use_ema', '--ema_warmup_epochs', '1', '--criterion', 'bce']
    flags += ['--mixup', '0.1', '--cutmix', '1', '--drop_path', '0.05', '--save_freq_steps', '1']

    def save_and_copy(self, name, epoch, step, logger, save=Run.save):
        save(self, name, epoch, step, logger)
        if (epoch, step) == (0, 3):
            shutil.copy(self.args.output_dir / name, tmp_path / 'middle.pth')

    monkeypatch.setattr(Run, 'save', save_and_copy)
    whole = train('finetune', data, tmp_path / 'whole', *flags)
    resumed = train('finetune', data, tmp_path / 'resumed', *flags, '--resume', tmp_path / 'middle.pth')
    assert load(tmp_path, 'middle.pth')['model']['bn1.num_batches_tracked'] == 3
    assert whole['model']['bn1.num_batches_tracked'] == 8
    assert {int(group['step']) for group in whole['optimizer']['param_groups']} == {8}
    for key in ('model', 'ema', 'optimizer', 'record'):
        assert same(resumed[key], whole[key]), key


def test_rule_kwargs_reach_the_rules(data, tmp_path):
    flags = [*FLAGS, '--weight_decay', '0.3']
    decays = []
    for more in ([], ['--rule_kwargs', 'decay_norms=True']):
        groups = train('finetune', data, tmp_path, *flags, *more)['optimizer']['param_groups']
        decays.append({group['weight_decay'] for group in groups})
    assert decays == [{0.0, 0.3}, {0.3}]
    with pytest.raises(UserError, match=r'convnet.param_rules has no option decay_norm; did you mean decay_norms\?'):
        train('finetune', data, tmp_path, *flags, '--rule_kwargs', 'decay_norm=True')
